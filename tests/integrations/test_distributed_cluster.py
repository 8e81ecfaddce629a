"""Clusters of distributed on zmq://, of real processes with nannies."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")
np = pytest.importorskip("numpy")

from distributed import Client, LocalCluster, Nanny, Scheduler, Worker  # noqa: E402

import zfabric.distributed  # noqa: E402, F401
from zfabric.transport import zmq_socket  # noqa: E402

# What dask and tornado do not close at once is not ours; what we left would be.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.large-graph-warning-threshold": "100MB",
    "distributed.worker.memory.terminate": False,
    "distributed.worker.memory.pause": False,
}


@pytest.fixture(scope="module", autouse=True)
def children_know_the_backend(tmp_path_factory):
    """Where zfabric lies on the path without being installed, nobody wrote its entry points."""
    paths = [str(ROOT)]
    if not importlib.metadata.entry_points(group="distributed.comm.backends", name="zmq"):
        folder = tmp_path_factory.mktemp("entry")
        info = folder / "zfabric_on_the_path-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zfabric-path\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[distributed.comm.backends]\nzmq = zfabric.distributed:ZmqBackend\n"
        )
        paths.append(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        for path in paths:  # multiprocessing hands this on, commands read PYTHONPATH
            patch.syspath_prepend(path)
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
        with dask.config.set(QUIET):
            yield


@pytest.fixture(autouse=True)
def no_socket_is_left(wait_until):
    yield
    wait_until(lambda: not len(zmq_socket.live), what="sockets closed")


def cluster(n_workers=2, **options):
    return LocalCluster(
        n_workers=n_workers,
        threads_per_worker=1,
        protocol="zmq://",
        dashboard_address=":0",
        silence_logs=40,
        **options,
    )


def work(client):
    """Many tasks, large values that cross between workers, a shuffle."""
    da = pytest.importorskip("dask.array")
    assert client.gather(client.map(pow, range(50), [2] * 50)) == [n * n for n in range(50)]
    x = da.ones((1000, 1000), chunks=(250, 250))
    assert float((x + x.T).sum().compute(scheduler=client)) == 2_000_000.0
    assert float(x.rechunk((1000, 50)).sum().compute(scheduler=client)) == 1_000_000.0


def test_a_cluster_of_processes_computes_and_ends() -> None:
    with cluster() as local, Client(local) as client:
        addresses = list(client.scheduler_info()["workers"])
        assert all(address.startswith("zmq://") for address in addresses)
        work(client)
        a, b = addresses
        big = client.submit(np.ones, 3_000_000, workers=[a], pure=False)
        moved = client.submit(lambda x: x.__iadd__(1).sum(), big, workers=[b])
        assert moved.result(timeout=30) == 6_000_000.0
        with Client(local) as second:
            assert second.submit(sum, [1, 2]).result(timeout=30) == 3
        client.restart(timeout=60)
        assert client.submit(sum, [1, 2, 3]).result(timeout=30) == 6


def test_a_killed_worker_is_replaced_and_its_work_done_again() -> None:
    with cluster() as local, Client(local) as client:
        pids = client.run(os.getpid)
        futures = client.map(lambda n: n + 1, range(100))
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        assert client.gather(futures) == list(range(1, 101))
        client.wait_for_workers(2, timeout=60)
        work(client)


def test_a_shuffle_between_workers() -> None:
    pd = pytest.importorskip("pandas")
    dd = pytest.importorskip("dask.dataframe")
    with cluster() as local, Client(local) as client:
        frame = pd.DataFrame({"k": np.arange(5000) % 37, "v": np.arange(5000.0)})
        ours = dd.from_pandas(frame, npartitions=8).shuffle("k", shuffle_method="p2p")
        sums = ours.groupby("k").v.sum().compute(scheduler=client)
        want = frame.groupby("k").v.sum()
        assert np.allclose(sums.sort_index(), want)


@pytest.mark.slow
def test_adaptive_scaling_up_and_down(wait_until) -> None:
    with cluster(0) as local, Client(local) as client:
        local.adapt(minimum=0, maximum=2, interval="100ms", wait_count=2)
        for _ in range(2):
            futures = client.map(lambda n: n * 2, range(20), pure=False)
            assert sum(client.gather(futures)) == 380
            del futures
            wait_until(
                lambda: not client.scheduler_info()["workers"], timeout_s=40, what="scaled to 0"
            )


def test_by_the_command_line() -> None:
    dask_command = [sys.executable, "-m", "dask"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    scheduler = subprocess.Popen(
        [*dask_command, "scheduler", "--protocol", "zmq", "--host", "127.0.0.1", "--port", "0",
         "--no-dashboard", "--no-show"],
        **options,
    )  # fmt: skip
    worker = None
    try:
        address = next(
            word for line in scheduler.stdout for word in line.split() if "zmq://" in word
        )
        worker = subprocess.Popen(
            [*dask_command, "worker", address, "--nthreads", "1", "--no-dashboard"],
            **options,
        )
        with Client(address, timeout=30) as client:
            client.wait_for_workers(1, timeout=40)
            work(client)
    finally:
        for process in filter(None, (worker, scheduler)):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@pytest.mark.slow
def test_a_cluster_of_jobs_by_dask_jobqueue() -> None:
    """Its way to Slurm, PBS, SGE and LSF; here the jobs are processes of this machine."""
    before = signal.getsignal(signal.SIGINT)
    try:
        local = pytest.importorskip("dask_jobqueue.local")
    finally:
        signal.signal(signal.SIGINT, before)  # importing it makes Ctrl-C a silent exit
    options = {"host": "127.0.0.1", "dashboard_address": ":0"}
    with (
        local.LocalCluster(
            cores=1, memory="2GB", protocol="zmq://", scheduler_options=options
        ) as jobs,
        Client(jobs) as client,
    ):
        jobs.scale(jobs=2)
        client.wait_for_workers(2, timeout=40)
        assert all(name.startswith("zmq://") for name in client.scheduler_info()["workers"])
        work(client)


async def one_round(number: int) -> None:
    """A scheduler, workers in this process, clients that come and go, a worker that dies."""
    async with Scheduler(protocol="zmq://", dashboard_address=":0") as scheduler:
        async with Worker(scheduler.address, nthreads=1) as a:
            async with Worker(scheduler.address, nthreads=1):
                async with Client(scheduler.address, asynchronous=True) as client:
                    async with Client(scheduler.address, asynchronous=True) as other:
                        x = await client.scatter(np.arange(200_000 + number), direct=True)
                        sums = [
                            client.submit(lambda v, n: v.sum() + n, x, n, pure=False)
                            for n in range(10)
                        ]
                        more = other.map(lambda n: n + number, range(10), pure=False)
                        first = await client.gather(sums)
                        assert first[1] == first[0] + 1
                        assert await other.gather(more) == [n + number for n in range(10)]
                    if number % 2:
                        await a.close(nanny=False)
                    again = client.map(lambda n: -n, range(10), pure=False)
                    assert sum(await client.gather(again)) == -45


def rounds(count: int) -> None:
    async def all_of_them():
        for number in range(count):
            await asyncio.wait_for(one_round(number), 60)
            assert not len(zmq_socket.live), f"sockets are left after round {number}"

    asyncio.run(all_of_them())


def test_rounds_of_coming_and_going() -> None:
    rounds(4)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(900)
def test_many_rounds_of_coming_and_going() -> None:
    """A hundred in `make faults-distributed`."""
    rounds(int(os.environ.get("ZMQ_COMM_ROUNDS", "25")))


@pytest.mark.slow
@pytest.mark.fault
def test_nannies_workers_die_again_and_again() -> None:
    async def main():
        async with Scheduler(protocol="zmq://", dashboard_address=":0") as scheduler:
            async with (
                Nanny(scheduler.address, nthreads=1) as a,
                Nanny(scheduler.address, nthreads=1) as b,
            ):
                async with Client(scheduler.address, asynchronous=True) as client:
                    for number in range(int(os.environ.get("ZMQ_COMM_KILLS", "4"))):
                        futures = client.map(lambda n: n + 1, range(50), pure=False)
                        nanny = (a, b)[number % 2]
                        os.kill(nanny.pid, signal.SIGKILL)
                        got = await asyncio.wait_for(client.gather(futures), 60)
                        assert got == list(range(1, 51))
                        await client.wait_for_workers(2, timeout=60)

    asyncio.run(main())


class KillsTheFirst(distributed.SchedulerPlugin):
    """Ends the first worker's process while the scheduler registers it, before it answers."""

    def __init__(self) -> None:
        self.killed = ""

    async def add_worker(self, scheduler, worker) -> None:
        if self.killed:
            return
        self.killed = worker
        before = {comm for comm in scheduler._comms if not comm.closed()}
        os.kill(scheduler.workers[worker].pid, signal.SIGKILL)
        while not any(comm.closed() for comm in before):
            await asyncio.sleep(0.01)


@pytest.mark.slow
def test_a_worker_that_dies_while_it_registers_is_not_listed() -> None:
    async def main():
        plugin = KillsTheFirst()
        async with Scheduler(protocol="zmq://", dashboard_address=":0") as scheduler:
            scheduler.add_plugin(plugin)
            with pytest.raises(RuntimeError, match="Nanny failed to start"):
                async with Nanny(scheduler.address, nthreads=1):
                    raise AssertionError("the worker was killed")
            while plugin.killed in scheduler.workers:
                await asyncio.sleep(0.01)
            assert plugin.killed

    asyncio.run(asyncio.wait_for(main(), 90))


def one_round_of_a_cluster(local, client, number: int) -> None:
    """Work that scales the cluster up, a shuffle, and a worker that is killed meanwhile."""
    pd = pytest.importorskip("pandas")
    dd = pytest.importorskip("dask.dataframe")
    frame = pd.DataFrame({"k": np.arange(3000) % 37, "v": np.arange(3000.0) + number})
    table = dd.from_pandas(frame, npartitions=6)
    sums = client.compute(table.shuffle("k", shuffle_method="p2p").groupby("k").v.sum())
    many = client.map(lambda n: n + number, range(200), pure=False)
    pids = [nanny.pid for nanny in local.workers.values() if getattr(nanny, "pid", None)]
    if pids:
        with contextlib.suppress(ProcessLookupError):  # scaled down meanwhile
            os.kill(pids[number % len(pids)], signal.SIGKILL)
    assert client.gather(many) == list(range(number, number + 200))
    want = frame.groupby("k").v.sum()
    assert np.allclose(sums.result().sort_index(), want)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_an_adaptive_cluster_shuffles_while_its_workers_die() -> None:
    """A hundred rounds in `make faults-distributed`; every fifth begins without any worker."""
    with cluster(1) as local, Client(local) as client:
        local.adapt(minimum=0, maximum=3, interval="100ms", wait_count=3)
        for number in range(int(os.environ.get("ZMQ_CLUSTER_ROUNDS", "3"))):
            began = monotonic()
            one_round_of_a_cluster(local, client, number)
            print(f"round {number}: {monotonic() - began:.1f} s", flush=True)
            while number % 5 == 4 and client.scheduler_info()["workers"]:
                client.sync(asyncio.sleep, 0.1)
