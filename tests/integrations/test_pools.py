"""Samplers and optimisers take a fabric for their pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

np = pytest.importorskip("numpy")

import zfabric  # noqa: E402

DATA = np.linspace(0.0, 1.0, 50_000)
"""Fat enough that sending it with each point would show."""


@pytest.fixture(scope="module")
def client() -> Iterator[zfabric.Client]:
    with zfabric.Client(slots=2) as opened:
        yield opened


class Posterior:
    """A normal distribution, and the data that a real one would look at."""

    def __init__(self) -> None:
        self.data = DATA

    def log_prob(self, x: Any) -> float:
        return float(-0.5 * np.sum(np.square(x)) + 0.0 * self.data[0])


def prior(u: Any) -> Any:
    return 20.0 * u - 10.0


def rosenbrock(x: Any) -> float:
    return float(np.sum(100.0 * (x[1:] - x[:-1] ** 2.0) ** 2.0 + (1 - x[:-1]) ** 2.0))


def test_emcee(client: zfabric.Client) -> None:
    emcee = pytest.importorskip("emcee")
    start = np.random.default_rng(1).normal(size=(20, 3))
    chains = []
    for pool in (client.pool(), None):
        np.random.seed(5)
        sampler = emcee.EnsembleSampler(20, 3, Posterior().log_prob, pool=pool)
        sampler.run_mcmc(start, 50)
        chains.append(sampler.get_chain())
    assert (chains[0] == chains[1]).all()


def test_dynesty(client: zfabric.Client) -> None:
    dynesty = pytest.importorskip("dynesty")
    evidence = []
    with client.pool() as pool:
        for options in ({"pool": pool}, {"pool": pool, "queue_size": 2}):
            sampler = dynesty.NestedSampler(
                Posterior().log_prob,
                prior,
                2,
                nlive=60,
                rstate=np.random.default_rng(2),
                **options,
            )
            sampler.run_nested(print_progress=False, dlogz=1.0)
            evidence.append(sampler.results.logz[-1])
    truth = np.log(2 * np.pi / 400.0)
    assert evidence[0] == evidence[1] and abs(evidence[0] - truth) < 1.5


def test_scipy(client: zfabric.Client) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    integrate = pytest.importorskip("scipy.integrate")
    bounds = [(0.0, 2.0)] * 3
    found = [
        optimize.differential_evolution(
            rosenbrock, bounds, workers=workers, updating="deferred", rng=1, maxiter=20, popsize=6
        ).x
        for workers in (client.map_sync, client.get_executor().map, 1)
    ]
    assert (found[0] == found[2]).all() and (found[1] == found[2]).all()
    grid = optimize.brute(rosenbrock, bounds[:2], Ns=6, workers=client.map_sync)
    assert np.allclose(grid, 1.0, atol=1e-3)
    value, _ = integrate.quad_vec(np.sin, 0.0, np.pi, workers=client.map_sync)
    assert abs(value - 2.0) < 1e-8
