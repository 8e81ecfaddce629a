"""One large argument of many calls goes to the workers once.

Between `submit(f, big, 1)` and `submit(f, big, 2)` the user's code may have changed `big`. So the
same object counts as the one that was sent before

  - if it cannot change: `bytes` and `str`;
  - if it is an array with the same content, by a SHA-256 of it, taken while it goes out. On one
    host, where memory is copied faster than it is hashed, arrays go each time.

Other objects go each time: nothing cheap can tell whether they changed. Nor are arrays hashed any
more once several have gone of which none came again, until one does.

What a task gets is its own, as if it had been sent for it alone: see `codec.arguments.with_own`.

A value is kept for the next call until others follow, or none for a while. Tasks keep theirs.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from zfabric.codec.arguments import dump_call, with_own
from zfabric.codec.serialise import Buffer, nbytes_of, pack

if TYPE_CHECKING:
    from zfabric.client.future import Future
    from zfabric.client.values import Values

MOST = 8
"""Values that are kept for calls to come."""

MOST_NBYTES = 512 * 2**20
"""Bytes of all of them, unless it is one alone."""

MOST_VAIN = 4
"""Arrays hashed in a row of which none came again."""

MOST_SEEN = 64
"""Arrays that are recognised if they come again, though they were not hashed."""

KEEP_S = 10.0
"""For which a value is kept that no call asks for."""


class _Sent(NamedTuple):
    """obj: what cannot change, kept so that its id stays its own; of an array a weak reference.
    content: its type, shape and hash, None of what cannot change."""

    obj: Any
    content: Any
    nbytes: int
    future: Future


class Call(NamedTuple):
    """futures: to be kept until the row is queued."""

    payload: bytes
    dependencies: Sequence[int]
    futures: list[Future]


class Repeats:
    """What the calls of one client have sent. Any thread may use it.

    limit: bytes up to which an argument rides along.
    """

    def __init__(self, values: Values, limit: int) -> None:
        self._values = values
        self._limit = limit
        self._lock = threading.RLock()  # what dies here may run code of the user's that calls
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        """By identity; the one that was not used for longest first."""
        self._nbytes = 0
        self._n_vain = 0
        self._seen: OrderedDict[int, ref[Any]] = OrderedDict()

    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], frames: Sequence[Buffer]
    ) -> Call | None:
        """A call with references in place of large arguments, which have been put into a store.

        frames: the call as it is.  None: that would not make it small enough to ride along.
        Raises what putting raises.
        """
        large: dict[int, tuple[Any, int]] = {}
        for arg in (*args, *kwargs.values()):
            nbytes = _nbytes(arg)
            if nbytes > self._limit:
                large[id(arg)] = (arg, nbytes)
        rest = nbytes_of(frames) - sum(nbytes for _, nbytes in large.values())
        if not large or rest > self._limit // 2:
            return None
        arrays = [arg for arg, _ in large.values() if not _is_fixed(arg)]
        if arrays and (self._values.are_on_this_host() or not all(map(self._may_repeat, arrays))):
            return None
        found = {id_: self._future(arg, nbytes) for id_, (arg, nbytes) in large.items()}
        frames, deps = dump_call(
            tuple([found.get(id(arg), arg) for arg in args]),
            {name: found.get(id(arg), arg) for name, arg in kwargs.items()},
        )
        own = {found[id_].task_id for id_, (arg, _) in large.items() if not _is_fixed(arg)}
        payload = with_own(pack(frames), [at for at, dep in enumerate(deps) if dep in own])
        return Call(payload, deps, list(found.values()))

    def tidy(self) -> None:
        """Let go of everything: no call has come for a while."""
        with self._lock:
            gone = list(self._sent.values())
            self._sent.clear()
            self._nbytes = 0
        del gone

    def _may_repeat(self, array: Any) -> bool:
        """Whether it is worth hashing."""
        with self._lock:
            sent = self._sent.get(id(array))
            seen = self._seen.pop(id(array), None)
            if (sent and _is_of(sent, array)) or (seen and seen() is array):
                self._n_vain = 0
            if self._n_vain < MOST_VAIN:
                return True
            self._seen[id(array)] = ref(array)
            while len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return False

    def _future(self, arg: Any, nbytes: int) -> Future:
        """The value of an argument: the one that went before, or a new one."""
        with self._lock:
            sent = self._sent.get(id(arg))
        content = None
        if sent is not None and _is_of(sent, arg) and self._values.is_there(sent.future):
            content = sent.content and _content(arg)
            if content == sent.content:
                self._keep(sent, id(arg))
                return sent.future
        contents = [content]

        def hash_it() -> None:
            if content is None and not _is_fixed(arg):
                contents.append(_content(arg))

        future = self._values.scatter([arg], meanwhile=hash_it)[0]  # it hashes while it sends
        obj = arg if _is_fixed(arg) else ref(arg)
        self._n_vain += obj is not arg
        self._keep(_Sent(obj, contents[-1], nbytes, future), id(arg))
        return future

    def _keep(self, sent: _Sent, key: int) -> None:
        gone = []
        with self._lock:
            gone.append(self._drop(key))
            self._sent[key] = sent
            self._nbytes += sent.nbytes
            while len(self._sent) > MOST or (self._nbytes > MOST_NBYTES and len(self._sent) > 1):
                gone.append(self._drop(next(iter(self._sent))))
            self._values.tidy_at(monotonic() + KEEP_S)
        del gone

    def _drop(self, key: int) -> _Sent | None:
        sent = self._sent.pop(key, None)
        if sent is not None:
            self._nbytes -= sent.nbytes
        return sent


def _is_of(sent: _Sent, arg: Any) -> bool:
    """Whether that object was sent, and not another one that has its id now."""
    return (sent.obj if sent.content is None else sent.obj()) is arg


def _is_fixed(arg: Any) -> bool:
    """Whether it can never change."""
    return type(arg) is bytes or type(arg) is str


def _nbytes(arg: Any) -> int:
    """Bytes of an argument that could be recognised, else 0."""
    kind = type(arg)
    if kind is bytes:
        return len(arg)
    if kind is str:
        return len(arg) if arg.isascii() else len(arg.encode("utf-8", "surrogatepass"))
    if kind is getattr(sys.modules.get("numpy"), "ndarray", None):
        flags = arg.flags
        if (flags.c_contiguous or flags.f_contiguous) and not arg.dtype.hasobject:
            return int(arg.nbytes)
    return 0


def _content(array: Any) -> Any:
    """Equal for two arrays only if they would arrive as equal ones."""
    flags = array.flags
    digest = hashlib.sha256(array.ravel(order="K").view("u1")).digest()
    return array.dtype, array.shape, flags.c_contiguous, flags.writeable, digest
