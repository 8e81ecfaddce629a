"""The one ZAP service of this process: says of each key whether it may come in.

libzmq asks at an inproc address whenever a CURVE handshake reaches its end, and holds the
connection back until the answer. Each listener has a door of its own name here (the ZAP domain), so
that several in one process keep apart. Anything odd is answered with a refusal; and while nobody
answers, nobody comes in (see `curve.py`).

The thread lives while there are doors. It does nothing else, so a busy broker delays no handshake.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable

import zmq

from zfabric.transport import zmq_socket

log = logging.getLogger(__name__)

ADDRESS = "inproc://zeromq.zap.01"

Admit = Callable[[bytes], str]

_lock = threading.Lock()
_names = itertools.count(1)
_service: Service | None = None


class Service:
    """The thread, and its doors: domain -> who may come in."""

    def __init__(self) -> None:
        self.doors: dict[bytes, Admit] = {}
        self.asked = 0
        """Questions that were answered."""
        self._pid = os.getpid()
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._socket: zmq.Socket[bytes] = zmq_socket.context().socket(zmq.REP)
        try:
            self._socket.set(zmq.LINGER, 0)
            self._socket.bind(ADDRESS)
        except BaseException:
            self._socket.close(0)
            os.close(self._stop_fd)
            raise
        self._thread = threading.Thread(target=self._run, name="zfabric-zap", daemon=True)
        self._thread.start()

    @property
    def is_ours(self) -> bool:
        """Not one that a parent process left in our memory when it forked us."""
        return self._pid == os.getpid()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread; the service is closed then."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._stop_fd, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if self._stop_fd in ready:
                    return
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
                self.asked += 1
        except zmq.ContextTerminated:
            pass
        except BaseException:
            log.exception("the service that admits keys failed: nobody new can join")
        finally:
            # Closing lets go of the address some time later, when the next service may have come.
            with contextlib.suppress(zmq.ZMQError):
                self._socket.unbind(ADDRESS)
            self._socket.close(0)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """Of ZAP 1.0: version, request id, domain, address, identity, mechanism, credentials."""
        request = question[1] if len(question) > 1 else b""
        user = ""
        try:
            version, _, domain, _, _, mechanism, *credentials = question
            admit = self.doors.get(domain)
            if version == b"1.0" and mechanism == b"CURVE" and len(credentials) == 1 and admit:
                user = admit(credentials[0])
            answer = user.encode("ascii")
        except Exception:  # the credentials stay out of the log
            log.error("a key could not be checked, and was refused", exc_info=True)
            user, answer = "", b""
        if not user:
            return [b"1.0", request, b"400", b"this key is not admitted", b"", b""]
        return [b"1.0", request, b"200", b"", answer, b""]


def open_door(admit: Admit) -> bytes:
    """The ZAP domain for a new listener. `admit` is called in the service's thread."""
    with _lock:
        service = _running()
        domain = b"zfabric.%d" % next(_names)
        service.doors[domain] = admit
        return domain


def close_door(domain: bytes) -> None:
    """Refuse everybody there from now on; the last door to close ends the service."""
    global _service
    with _lock:
        service = _service
        if service is None or not service.is_ours:
            return
        service.doors.pop(domain, None)
        if not service.doors:
            service.stop()
            _service = None


def supervise() -> bool:
    """Start the service again where it has ended though there are doors. Whether it had."""
    with _lock:
        if _service is None or not _service.is_ours or _service.is_alive:
            return False
        _running()
        return True


def _running() -> Service:
    global _service
    if _service is None or not _service.is_ours:
        _service = Service()
    elif not _service.is_alive:
        doors = _service.doors
        _service.stop()
        _service = Service()
        _service.doors.update(doors)
    return _service
