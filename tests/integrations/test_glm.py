"""Dask-GLM and dask-ml run on a fabric unchanged, and agree with the threaded scheduler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

for _module in ("dask.array", "dask_glm", "dask_ml", "sklearn"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(_module)

import dask  # noqa: E402
import dask.array as da  # noqa: E402
import numpy as np  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from dask_glm import algorithms
    from dask_glm.families import Logistic

import zfabric  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

RIDGE = {"regularizer": "l2", "lamduh": 1.0}
SOLVERS: list[tuple[str, dict[str, Any]]] = [
    ("newton", {}),
    ("lbfgs", RIDGE),
    ("admm", RIDGE),
    ("proximal_grad", RIDGE),
    ("gradient_descent", {}),
]


@pytest.fixture(scope="module")
def client() -> Iterator[zfabric.Client]:
    with zfabric.Client(slots=2) as opened:
        yield opened


def data() -> tuple[Any, Any]:
    """300 points of 4 features in 3 blocks, with noise, so that a best fit exists."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(300, 4))
    y = (x @ [1.0, -2.0, 0.5, 0.0] + rng.normal(size=300) > 0).astype(float)
    return da.from_array(x, chunks=(100, 4)), da.from_array(y, chunks=100)


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=[name for name, _ in SOLVERS])
def test_solvers_agree(client: zfabric.Client, solver: str, options: dict[str, Any]) -> None:
    def run() -> Any:
        x, y = dask.persist(*data())
        return getattr(algorithms, solver)(x, y, family=Logistic, max_iter=10, **options)

    with dask.config.set(scheduler="threads"):
        expected = run()
    with client.as_dask_scheduler():
        found = run()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def both(client: zfabric.Client, run: Any) -> tuple[Any, Any]:
    """What it gives by the threaded scheduler, and by the client."""
    with dask.config.set(scheduler="threads"):
        expected = run()
    with client.as_dask_scheduler():
        return expected, run()


def test_logistic_regression(client: zfabric.Client) -> None:
    from dask_ml.linear_model import LogisticRegression

    def run() -> Any:
        x, y = data()
        fitted = LogisticRegression(solver="admm", max_iter=10).fit(x, y)
        return fitted.coef_, fitted.predict(x).compute()

    expected, found = both(client, run)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert (found[1] == expected[1]).all()


def test_k_means(client: zfabric.Client) -> None:
    from dask_ml.cluster import KMeans

    def run() -> Any:
        x, _ = data()
        fitted = KMeans(n_clusters=3, random_state=0, init="random", max_iter=20).fit(x)
        return fitted.cluster_centers_, np.asarray(fitted.labels_)

    expected, found = both(client, run)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert (found[1] == expected[1]).all()


def test_pca(client: zfabric.Client) -> None:
    from dask_ml.decomposition import PCA

    def run() -> Any:
        x, _ = data()
        fitted = PCA(n_components=2, svd_solver="tsqr", random_state=0).fit(x)
        return np.abs(fitted.components_), fitted.explained_variance_

    expected, found = both(client, run)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


def test_grid_search(client: zfabric.Client) -> None:
    from dask_ml.model_selection import GridSearchCV
    from sklearn.linear_model import LogisticRegression

    def run() -> Any:
        x, y = (each.compute(scheduler="sync") for each in data())
        search = GridSearchCV(LogisticRegression(), {"C": [0.01, 0.1, 1.0]}, cv=3)
        search.fit(x, y)
        return search.best_params_, search.cv_results_["mean_test_score"]

    expected, found = both(client, run)
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
