"""A broker and one worker in one process and one thread: a local fabric with a single worker.

A lone task's way is mostly waking processes, each of which finds its caches cold. Between a broker
and a worker of their own processes that is two ZeroMQ hops of four thread switches each, packing
and parsing; here it is two method calls. The broker still listens for clients and further workers,
and neither half runs user code. What is lost is that the two can die apart, which is worth nothing
where one parent owns both.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from time import monotonic
from typing import Any

from zfabric.config import Settings
from zfabric.core.broker import BrokerMachine
from zfabric.core.direct import DirectSession
from zfabric.errors import AddressInUse, ConfigError
from zfabric.ids import new_token
from zfabric.runtime.binding import link_options
from zfabric.runtime.broker_loop import BrokerLoop, machine_arguments
from zfabric.runtime.lifecycle import (
    StopRequest,
    allow_many_descriptors,
    freeze_garbage,
    remove_orphan,
    tell_ready,
)
from zfabric.runtime.worker import Worker
from zfabric.transport import Poller, listen
from zfabric.wire import Header

log = logging.getLogger(__name__)

MAX_EXCHANGES = 64
"""Rounds between broker and worker per turn, so that a chain of tasks which end at once does not
keep a client from being heard."""


class EmbeddedLoop:
    """Moves what the two halves have for each other, and what sockets and slots have for them."""

    def __init__(self, broker: BrokerLoop, worker: Worker, up: DirectSession, now: float) -> None:
        self._broker = broker
        self._worker = worker
        self._up = up
        self._record = broker.machine.attach(worker.hello(), up.token, now)
        down = self._record.session
        assert isinstance(down, DirectSession)
        self._down = down
        self._header = Header(0, up.token, broker.machine.epoch, 0, 0)
        self._tell_worker(now)  # its Welcome

    def run(self, stop: StopRequest, poller: Poller) -> str:
        """Until asked to stop, or until no slot can be started. Returns why."""
        broker, worker = self._broker, self._worker
        while not stop.requested and not worker.failure:
            now = monotonic()
            ready = poller.wait(min(broker.sleep_s(now), worker.sleep_s(now)))
            self._turn(ready, monotonic())
        if worker.failure:
            log.error("%s", worker.failure)
        broker.close()
        return stop.requested or worker.failure

    def _turn(self, ready: Iterable[Any], now: float) -> None:
        broker, worker = self._broker, self._worker
        worker.take_in([thing for thing in ready if thing is not broker.listener], now)
        broker.receive(now)
        for _ in range(MAX_EXCHANGES):
            worker.act(now)
            worker.speak(now)
            self._tell_broker(now)
            broker.machine.turn()
            if self._down.inbox:
                self._tell_worker(now)
                worker.act(now)
                if broker.machine.dirty:
                    broker.send()
                if not worker.await_answer(now):
                    break
            else:
                break
        broker.send()

    def _tell_broker(self, now: float) -> None:
        inbox = self._up.inbox
        while inbox:
            self._broker.machine.deliver(self._record, inbox.popleft(), now)
        self._worker.acked(self._up.posted)
        worker = self._broker.machine.scheduler.workers.get(self._record.number)
        if worker is not None:
            worker.load = self._up.load
            worker.n_beats += 1

    def _tell_worker(self, now: float) -> None:
        inbox = self._down.inbox
        while inbox:
            self._worker.on_message(self._header, inbox.popleft(), now)


def serve(
    address: str,
    *,
    slots: int,
    kind: str = "process",
    name: str = "local-1",
    resources: dict[str, float] | None = None,
    memory_limit: int = 0,
    lifeline_fd: int | None = None,
    ready_fd: int | None = None,
    orphaned_directory: str | None = None,
) -> int:
    """Run both until SIGTERM, SIGINT or the end of the lifeline. Returns the exit code.

    Arguments as of runtime.broker.serve and runtime.worker.serve.
    """
    allow_many_descriptors()
    with StopRequest(lifeline_fd) as stop:
        settings = Settings.load()
        try:
            listener = listen(address, **link_options(address, settings))
        except (ConfigError, AddressInUse) as exc:
            log.error("%s", exc)
            return 2
        poller = Poller()
        machine = BrokerMachine(**machine_arguments(listener.address, settings))
        broker = BrokerLoop(listener, machine, stop, poller)
        up = DirectSession(new_token(), machine.epoch)
        worker = None
        try:
            worker = Worker(
                listener.address,
                slots,
                kind,
                name,
                resources or {},
                None,
                settings,
                stop,
                memory_limit=memory_limit,
                direct=up,
                poller=poller,
            )
            loop = EmbeddedLoop(broker, worker, up, monotonic())
            tell_ready(ready_fd, listener.address)
            freeze_garbage()
            why = loop.run(stop, poller)
            failed = bool(worker.failure)
        finally:
            if worker is not None:
                worker.close()
            listener.close(linger_s=0.2)
            remove_orphan(orphaned_directory, stop)
    log.info("local fabric stopped: %s", why)
    return int(failed)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="zfabric: %(message)s")
    sys.exit(serve(**json.loads(sys.argv[1])))
