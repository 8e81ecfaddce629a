"""joblib's Parallel, and scikit-learn on it, run on a fabric."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

joblib = pytest.importorskip("joblib")

import zfabric  # noqa: E402
import zfabric.joblib  # noqa: E402
from zfabric.integrations.joblib import backend as backend_module  # noqa: E402

delayed, Parallel = joblib.delayed, joblib.Parallel


@pytest.fixture(scope="module")
def client() -> Iterator[zfabric.Client]:
    with zfabric.Client(slots=2) as opened, joblib.parallel_config("zfabric", client=opened):
        yield opened


def square(x: Any) -> Any:
    return x * x


def fail_at(x: int, bad: int) -> int:
    if x == bad:
        raise LookupError(f"no {x}")
    return x


def total(x: Any) -> float:
    return float(x.sum())


def inner(n: int) -> int:
    return sum(Parallel(n_jobs=-1)(delayed(square)(x) for x in range(n)))


def who_runs_nested() -> str:
    return type(joblib.parallel.get_active_backend()[0]).__name__


def who_runs_deeper() -> list[str]:
    return Parallel(n_jobs=2)(delayed(who_runs_nested)() for _ in range(2))


def wait_for(path: str) -> int:
    while not Path(path).exists():
        time.sleep(0.01)
    return 1


def die() -> None:
    import os

    os._exit(3)


@pytest.mark.usefixtures("client")
def test_values_come_in_order() -> None:
    assert Parallel()(delayed(square)(x) for x in range(500)) == [x * x for x in range(500)]
    assert Parallel(n_jobs=2)(delayed(square)(x) for x in range(3)) == [0, 1, 4]
    assert Parallel()([]) == []


@pytest.mark.usefixtures("client")
def test_what_a_call_raises_is_raised_and_the_next_calls_run() -> None:
    with pytest.raises(LookupError, match="no 3"):
        Parallel()(delayed(fail_at)(x, 3) for x in range(50))
    assert Parallel()(delayed(square)(x) for x in range(9))[-1] == 64


@pytest.mark.usefixtures("client")
def test_generators() -> None:
    values = Parallel(return_as="generator")(delayed(square)(x) for x in range(40))
    assert next(values) == 0
    assert list(values) == [x * x for x in range(1, 40)]
    unordered = Parallel(return_as="generator_unordered")(delayed(square)(x) for x in range(40))
    assert sorted(unordered) == [x * x for x in range(40)]


@pytest.mark.usefixtures("client")
def test_a_timeout_ends_the_call(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with pytest.raises(multiprocessing.TimeoutError):
        Parallel(timeout=0.1)(delayed(wait_for)(str(go)) for _ in range(2))
    go.touch()
    assert Parallel()(delayed(square)(x) for x in range(4)) == [0, 1, 4, 9]


@pytest.mark.usefixtures("client")
def test_a_process_that_dies_raises() -> None:
    with pytest.raises(zfabric.KilledTask):
        Parallel()(delayed(die)() for _ in range(2))


class Batch:
    """As joblib's BatchedCalls."""

    def __init__(self, fn: Any, *args: Any) -> None:
        self.items = [(fn, args, {})]
        self._backend, self._n_jobs = joblib.parallel.SequentialBackend(nesting_level=1), None


def test_a_callback_comes_once_however_a_batch_ends(
    client: zfabric.Client, tmp_path: Path, wait_until: Any
) -> None:
    backend = backend_module.ZFabricBackend(client)
    called: list[Any] = []
    good = backend.submit(Batch(square, 3), called.append)
    bad = backend.submit(Batch(fail_at, 1, 1), called.append)
    killed = backend.submit(Batch(die), called.append)
    held = backend.submit(Batch(wait_for, str(tmp_path / "go")), called.append)
    wait_until(lambda: len(called) == 3)
    assert backend.retrieve_result_callback(good) == [9]
    backend.abort_everything()
    wait_until(lambda: len(called) == 4)
    (tmp_path / "go").touch()
    assert held.cancelled() and not backend._unfinished
    with pytest.raises(zfabric.TaskCancelled):
        backend.retrieve_result_callback(held)
    # Callbacks run one after the other: behind this one there are no more of the others.
    last = threading.Event()
    backend.submit(Batch(square, 1), lambda _: last.set())
    assert last.wait(10)
    assert sorted(map(id, called)) == sorted(map(id, [good, bad, killed, held]))


@pytest.mark.usefixtures("client")
def test_nested_calls_are_tasks_and_deeper_ones_run_in_place() -> None:
    assert Parallel()(delayed(inner)(n) for n in range(2, 7)) == [1, 5, 14, 30, 55]
    assert Parallel()(delayed(who_runs_nested)() for _ in range(2)) == ["ZFabricBackend"] * 2
    deeper = Parallel()(delayed(who_runs_deeper)() for _ in range(2))
    assert deeper == [["SequentialBackend"] * 2] * 2


def test_shared_data_goes_once(client: zfabric.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    scattered: list[Any] = []
    scatter = client._values.scatter

    def spy(data: Any, broadcast: bool = False) -> Any:
        scattered.extend(data)
        return scatter(data, broadcast)

    monkeypatch.setattr(client._values, "scatter", spy)
    data = np.ones(100_000)
    assert Parallel()(delayed(total)(data) for _ in range(30)) == [1e5] * 30
    assert len(scattered) == 1 and scattered[0] is data


@pytest.mark.usefixtures("client")
def test_n_jobs() -> None:
    assert joblib.effective_n_jobs(-1) == 2
    assert joblib.effective_n_jobs(-2) == 1
    assert joblib.effective_n_jobs(7) == 7
    with pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)(delayed(square)(x) for x in range(3))
    assert Parallel(n_jobs=1)(delayed(who_runs_nested)() for _ in range(1))


@pytest.mark.usefixtures("client")
def test_shared_memory_falls_back_to_threads() -> None:
    seen: list[int] = []
    Parallel(n_jobs=2, require="sharedmem")(delayed(seen.append)(x) for x in range(3))
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.usefixtures("client")
def test_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    x, y = datasets.load_iris(return_X_y=True)
    forest = RandomForestClassifier(n_estimators=12, random_state=1, n_jobs=-1).fit(x, y)
    with joblib.parallel_config("sequential"):
        alone = RandomForestClassifier(n_estimators=12, random_state=1).fit(x, y)
    assert (forest.predict_proba(x) == alone.predict_proba(x)).all()
    search = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=3, n_jobs=-1).fit(x, y)
    assert search.best_params_ == {"C": 1} or search.best_score_ > 0.9
    with joblib.parallel_config("sequential"):
        again = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=3).fit(x, y)
    assert search.best_params_ == again.best_params_
