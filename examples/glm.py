"""Logistic regression by Dask-GLM on a fabric: five solvers, many tiny iterations.

    python examples/glm.py                                  a table of times, and a picture
    python examples/glm.py --peers threads,distributed      the same by other schedulers beside it
    python examples/glm.py --address tcp://broker:8787

The data are the 569 tumours of scikit-learn's breast cancer set, ten measurements each, kept on the
workers by `persist`. Each iteration is a handful of tasks of microseconds, so what is measured is
what a scheduler costs. All coefficients are compared with those of Dask's threaded scheduler.

Needs zfabric[dask], dask-glm, scikit-learn and, for the picture, matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

import zfabric

warnings.filterwarnings("ignore", category=FutureWarning, module="dask")
# exp() overflows on the way of a line search, which then takes a shorter step.
warnings.filterwarnings("ignore", category=RuntimeWarning)

from dask_glm import algorithms  # noqa: E402
from dask_glm.families import Logistic  # noqa: E402

RIDGE = {"regularizer": "l2", "lamduh": 1.0}
SOLVERS: dict[str, dict[str, Any]] = {
    "newton": {},
    "lbfgs": RIDGE,
    "admm": RIDGE,
    "proximal_grad": RIDGE,
    "gradient_descent": {},
}
AGREE = 1e-6
CURVE = (1, 2, 3, 5, 8, 13, 21)
"""Iterations after which the loss is looked at, for the picture."""


class Problem(NamedTuple):
    """x: one row per tumour, standardised, and a column of ones.  y: 1.0 for a benign one."""

    x: Any
    y: Any

    def loss(self, coefficients: Any) -> float:
        """Negative log likelihood per tumour."""
        logits = self.x @ coefficients
        return float(np.mean(np.logaddexp(0.0, logits) - self.y * logits))


def breast_cancer() -> Problem:
    """The ten mean measurements: with all thirty the two classes can be separated, and the
    coefficients of a maximum likelihood fit would grow without end."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x[:, :10])
    return Problem(np.column_stack([x, np.ones(len(x))]), y.astype(float))


def solve(problem: Problem, solver: str, n_blocks: int, max_iter: int) -> Any:
    """The coefficients, by whatever scheduler Dask uses now. Shape (11,)."""
    n = -(-len(problem.y) // n_blocks)
    x = da.from_array(problem.x, chunks=(n, problem.x.shape[1]))
    y = da.from_array(problem.y, chunks=n)
    x, y = dask.persist(x, y)
    run = getattr(algorithms, solver)
    return run(x, y, family=Logistic, max_iter=max_iter, **SOLVERS[solver])


# --- Schedulers -----------------------------------------------------------------------------------


@contextmanager
def by_zfabric(address: str | None) -> Iterator[None]:
    with zfabric.Client(address):
        yield


@contextmanager
def by_threads(address: str | None) -> Iterator[None]:
    with dask.config.set(scheduler="threads"):
        yield


@contextmanager
def by_distributed(address: str | None) -> Iterator[None]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        yield


SCHEDULERS: dict[str, Callable[[str | None], Any]] = {
    "zfabric": by_zfabric,
    "threads": by_threads,
    "distributed": by_distributed,
}


def timed(
    problem: Problem, scheduler: str, address: str | None, n_blocks: int, max_iter: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds and coefficients per solver; one short run before, so that workers are warm."""
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}
    with SCHEDULERS[scheduler](address):
        solve(problem, "admm", n_blocks, 1)
        for solver in SOLVERS:
            began = perf_counter()
            found[solver] = solve(problem, solver, n_blocks, max_iter)
            seconds[solver] = perf_counter() - began
    return seconds, found


# --- What people see ------------------------------------------------------------------------------


def table(seconds: dict[str, dict[str, float]]) -> str:
    """One line per solver, one column of seconds per scheduler."""
    lines = ["solver            " + "".join(f"{name:>14}" for name in seconds)]
    for solver in SOLVERS:
        times = "".join(f"{each[solver]:>12.2f} s" for each in seconds.values())
        lines.append(f"{solver:<18}{times}")
    totals = {name: sum(each.values()) for name, each in seconds.items()}
    lines.append(f"{'all':<18}" + "".join(f"{total:>12.2f} s" for total in totals.values()))
    ours = totals["zfabric"]
    others = {name: total for name, total in totals.items() if name != "zfabric"}
    lines += [f"{name} / zfabric: {total / ours:.1f}" for name, total in others.items()]
    return "\n".join(lines)


def draw(problem: Problem, address: str | None, n_blocks: int, path: Path) -> None:
    """Loss after few iterations, per solver, above the least that any of them reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with by_zfabric(address):
        losses = {
            solver: [problem.loss(solve(problem, solver, n_blocks, n)) for n in CURVE]
            for solver in SOLVERS
        }
    least = min(map(min, losses.values()))
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for solver, values in losses.items():
        excess = np.maximum(np.array(values) - least, 1e-9)
        axes.plot(CURVE, excess, marker="o", label=solver.replace("_", " "))
    axes.set(xlabel="iterations at most", ylabel="loss above the least", yscale="log")
    axes.set_title("Dask-GLM's solvers on a fabric: 569 tumours, 10 measurements")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", help="of a broker; without one, this machine's cores")
    parser.add_argument("--peers", default="threads", help="threads, distributed")
    parser.add_argument("--blocks", type=int, default=4, help="of rows of the data")
    parser.add_argument("--iterations", type=int, default=30, help="per solver at most")
    parser.add_argument("--picture", type=Path, default=Path("glm.png"), help="where to draw it")
    given = parser.parse_args()
    peers = [name for name in given.peers.split(",") if name]
    unknown = set(peers) - SCHEDULERS.keys()
    if unknown:
        parser.error(f"no such scheduler: {', '.join(sorted(unknown))}")

    problem = breast_cancer()
    seconds: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(["zfabric", "threads", *peers]):
        seconds[name], found[name] = timed(
            problem, name, given.address, given.blocks, given.iterations
        )
    print(table(seconds))
    worst = max(
        float(np.abs(found["zfabric"][solver] - found["threads"][solver]).max())
        for solver in SOLVERS
    )
    print(f"largest difference from the threaded scheduler's coefficients: {worst:.1e}")
    draw(problem, given.address, given.blocks, given.picture)
    print(f"convergence: {given.picture}")
    if worst > AGREE:
        print(f"the coefficients differ by more than {AGREE:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
