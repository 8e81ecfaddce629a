"""Every error that zfabric raises, as one tree under `ZFabricError`.

Each error has fields, a sentence that says what to do next, and survives pickling. Where the
standard library has a class that callers already catch (TimeoutError, CancelledError,
ConnectionError, TypeError, ValueError), ours inherits from it too.

    ZFabricError
    ├── ConfigError             a setting, option or address makes no sense
    │   └── InsecureBind        beyond loopback without keys
    ├── UsageError              the call makes no sense: closed client, foreign future, ...
    │   └── ClientClosed
    ├── TransportError          bytes could not be moved
    │   ├── ConnectFailed       nobody answered in time
    │   ├── AddressInUse
    │   ├── ChannelClosed       the other end is gone, or we closed
    │   └── FrameTooLarge
    ├── ProtocolError
    │   ├── LocalProtocolError  we misused the protocol
    │   ├── RemoteProtocolError the peer did
    │   └── Refused             the broker refused the session (version, role, ...)
    ├── CodecError              an object could not become bytes, or the other way
    │   ├── Unserialisable      names the path to the culprit
    │   └── ModuleMissing       a worker (or this side) lacks a module
    ├── TaskError               a task ended without a value
    │   ├── TaskFailed          it raised something that cannot be rebuilt here
    │   ├── TaskCancelled
    │   ├── TaskTimeout         it ran longer than its time limit, and was killed
    │   ├── MemoryExceeded      it took more memory than its slot may, and was killed
    │   ├── KilledTask          it killed its process too often; has the attempts
    │   ├── UnknownOutcome      it may have run, and must not run twice
    │   ├── TaskLost            its worker went and it may not run again
    │   ├── DataLost            a value is gone and cannot be computed again
    │   ├── NoWorkerFits        no worker has what it asks for
    │   └── QuotaExceeded       the broker has no room for it
    ├── WorkerLost
    ├── ResultTimeout           a wait took longer than asked for
    └── InternalError           a bug of ours: has the story that led to it
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any


class ZFabricError(Exception):
    """Root of the tree. Subclasses name their fields in `_fields`; pickling uses them."""

    _fields: tuple[str, ...] = ("message",)

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {name: getattr(self, name) for name in self._fields})


def _rebuild(kind: type[ZFabricError], fields: dict[str, Any]) -> ZFabricError:
    return kind(**fields)


class ConfigError(ZFabricError, ValueError):
    """A setting, an option or an address makes no sense."""


class InsecureBind(ConfigError):
    """A listener beyond loopback was asked for without keys."""


class UsageError(ZFabricError, TypeError):
    """A call that makes no sense; the text names what to call instead."""


class ClientClosed(UsageError, RuntimeError):
    """The client was closed before this call."""


class TransportError(ZFabricError, ConnectionError):
    """Bytes could not be moved."""


class ConnectFailed(TransportError):
    """Nobody answered at the address in time."""

    _fields = ("address", "waited_s", "message")

    def __init__(self, address: str, waited_s: float, message: str = "") -> None:
        super().__init__(
            message
            or f"nothing answers at {address} after {waited_s:.3g} s; "
            "did you start `zfabric broker`, and is this its address?"
        )
        self.address = address
        self.waited_s = waited_s


class AddressInUse(TransportError):
    """Somebody else listens there."""

    _fields = ("address", "message")

    def __init__(self, address: str, message: str = "") -> None:
        super().__init__(
            message or f"{address} is in use; choose another port, or 0 for a free one"
        )
        self.address = address


class ChannelClosed(TransportError):
    """The other end is gone, or this end was closed. Nothing of this call was sent."""


class FrameTooLarge(TransportError, ValueError):
    """A frame is larger than the transport takes. Nothing was sent."""


class ProtocolError(ZFabricError):
    """Somebody broke the rules of the wire."""


class LocalProtocolError(ProtocolError):
    """We did: a bug here."""


class RemoteProtocolError(ProtocolError):
    """The peer did. `reason` is a short constant word, so that it can be counted."""

    _fields = ("reason", "message")

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class Refused(ProtocolError, ConnectionError):
    """The broker refused the session; `code` says why (`version`, `role`, `full`, ...)."""

    _fields = ("code", "message")

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or f"the broker refused this session: {code}")
        self.code = code


class CodecError(ZFabricError):
    """An object could not become bytes, or bytes an object."""


class Unserialisable(CodecError, TypeError):
    """An object cannot be pickled. `path` leads to the culprit, e.g. `args[1]['db']._lock`."""

    _fields = ("path", "type_name", "reason", "message")

    def __init__(self, path: str, type_name: str, reason: str = "", message: str = "") -> None:
        is_result = path == "result" or path.startswith(("result.", "result["))
        super().__init__(
            message
            or f"cannot {'return' if is_result else 'send'} {path}: an object of type {type_name}"
            + " cannot be pickled"
            + (f" ({reason})" if reason else "")
            + (
                ". Return plain data instead, such as what it is made from."
                if is_result
                else ". Make it inside the task instead, or pass what it is made from. Nothing was"
                " sent."
            )
        )
        self.path = path
        self.type_name = type_name
        self.reason = reason


class ModuleMissing(CodecError, ModuleNotFoundError):
    """A function or a value needs a module that is not installed where it arrived.

    module: its name.  file: where the sender has it from, "" if unknown.
    """

    _fields = ("module", "file", "message")

    def __init__(self, module: str, file: str = "", message: str = "") -> None:
        source = f" (from {file})" if file else ""
        super().__init__(message or f"module {module}{source} is not here; install it")
        self.name = self.module = module  # ModuleNotFoundError's word, and ours
        self.file = file


class TaskError(ZFabricError):
    """A task ended without a value."""

    _fields: tuple[str, ...] = ("message", "key")

    def __init__(self, message: str = "", key: str = "") -> None:
        super().__init__(message)
        self.key = key


class TaskFailed(TaskError):
    """The task raised an exception that cannot be rebuilt here; its texts are all we have."""

    _fields: tuple[str, ...] = ("message", "key", "type_name", "traceback")

    def __init__(
        self, message: str = "", key: str = "", type_name: str = "", traceback: str = ""
    ) -> None:
        super().__init__(message, key)
        self.type_name = type_name
        self.traceback = traceback


class TaskCancelled(TaskError, CancelledError):
    """Somebody cancelled the task, or the client that wanted it went away."""


class TaskTimeout(TaskError, TimeoutError):
    """The task ran longer than its `timeout`; its process was killed."""


class MemoryExceeded(TaskError, MemoryError):
    """The task took more memory than a slot of its worker may; its process was killed."""


class UnknownOutcome(TaskError):
    """The task was submitted with `idempotent=False`, and its slot or worker vanished when it may
    have begun: nobody knows what it has done, and it does not run again."""


class KilledTask(TaskError):
    """The task killed its process on every try. `attempts` tells of each, oldest first."""

    _fields: tuple[str, ...] = ("message", "key", "attempts")

    def __init__(self, message: str = "", key: str = "", attempts: Sequence[str] = ()) -> None:
        super().__init__(message, key)
        self.attempts = tuple(attempts)


class TaskLost(TaskError):
    """The worker that ran the task went away, and the task may not run again."""


class DataLost(TaskError):
    """A value went with the worker that held it and no task can make it again."""


class NoWorkerFits(TaskError):
    """No worker has what the task asks for."""


class QuotaExceeded(TaskError):
    """The broker did not take the task in: it keeps as much as its settings allow."""


class WorkerLost(ZFabricError):
    """A worker went away in the middle of something that only it could do."""


class ResultTimeout(ZFabricError, TimeoutError):
    """A wait took longer than asked for. The task goes on."""


class InternalError(ZFabricError):
    """A bug of ours. `story` is what happened before, oldest first."""

    _fields = ("message", "story")

    def __init__(self, message: str = "", story: Sequence[str] = ()) -> None:
        super().__init__(message + "".join(f"\n  {line}" for line in story))
        self.message = message
        self.story = tuple(story)
