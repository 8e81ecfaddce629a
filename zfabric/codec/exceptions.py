"""Exceptions across processes: the original type where possible, its text always.

An exception is sent as its type's name, its message, the formatted remote traceback, and, when it
survives pickling *and unpickling* here, itself with its cause, context, notes and group members.
The round trip is made on this side, because a class whose `__init__` wants other arguments than
`args` pickles happily and fails, or says something else, where it is loaded. Such an exception is
tried once more without calling `__init__`: type, args and attributes put together by hand, which
serves nearly every class written in Python. What survives neither way becomes `TaskFailed`.

Where it is loaded, the remote traceback hangs at the end of the chain of causes as a
`RemoteTraceback`, so a printed traceback begins with what happened on the worker, while
`exc.__cause__` is still the cause that the task gave it.
"""

from __future__ import annotations

import os
import pickle
import traceback
from typing import Any

from zfabric.codec.serialise import PROTOCOL, Buffer, pickle_frames
from zfabric.errors import CodecError, TaskFailed

LIMIT = 256 * 1024
"""Bytes that one exception may take on the wire, unless the caller says otherwise."""

_MAX_MESSAGE = 8 * 1024
_MAX_LINKS = 20  # exceptions in one chain that are sent as objects; the text has them all
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

_PLAIN_REDUCE = BaseException.__reduce__


class RemoteTraceback(Exception):
    """The traceback of a task's exception as text; the cause at the end of its chain."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


def dump_exception(exc: BaseException, limit: int = LIMIT, where: str = "") -> bytes:
    """The exception as a blob of about `limit` bytes at most. Never raises an Exception.

    where: one line put above the traceback, such as the worker's name and the call.
    """
    try:
        text = traceback_text(exc, limit // 4)
        if where:
            text = f"{where}\n{text}"
    except Exception as bug:
        text = f"the traceback could not be formatted: {type(bug).__name__}"
    name, message = _type_name(exc), _message(exc)
    try:
        packed = _pickled(exc, limit - len(text) - len(message))
    except (Exception, SystemExit):  # hooks of a hostile class
        packed = None
    return pickle.dumps((name, message, text, packed), PROTOCOL)


def load_exception(blob: Buffer) -> BaseException:
    """The exception, to be raised. Never raises an Exception.

    It is a TaskFailed if the original cannot be rebuilt here, a CodecError if the blob is broken.
    """
    try:
        name, message, text, packed = pickle.loads(blob)
    except Exception as bug:
        return CodecError(f"the task failed, and its exception could not be read: {bug}")
    exc = _rebuilt(packed) if packed is not None else None
    if exc is None:
        exc = TaskFailed(f"{name}: {message}", type_name=name, traceback=text)
    try:
        end = exc
        seen = {id(end)}
        while end.__cause__ is not None and id(end.__cause__) not in seen:
            end = end.__cause__
            seen.add(id(end))
        if end.__cause__ is None:
            end.__cause__ = RemoteTraceback(text)
    except Exception:
        return TaskFailed(f"{name}: {message}", type_name=name, traceback=text)
    return exc


def traceback_text(exc: BaseException, limit: int = LIMIT // 4) -> str:
    """The formatted traceback with the whole chain, without zfabric's own frames above the task.

    limit: characters; from a longer text the middle is left out.
    """
    try:
        told = traceback.TracebackException.from_exception(exc, compact=True)
        _drop_our_frames(told)
        text = "".join(told.format())
    except Exception:
        text = "".join(traceback.format_tb(exc.__traceback__)) + f"{_type_name(exc)}: "
        text += _message(exc)
    return _shortened(text, limit)


def _drop_our_frames(told: traceback.TracebackException) -> None:
    """Cut the frames between the slot's loop and the user's function, all along the chain."""
    waiting = [told]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        ours = 0
        for frame in part.stack:
            if not frame.filename.startswith(_OURS):
                break
            ours += 1
        if ours < len(part.stack):  # if all of it is ours, it is all we can show
            del part.stack[:ours]
        waiting += [p for p in (part.__cause__, part.__context__) if p is not None]
        waiting += part.exceptions or []


def _pickled(exc: BaseException, limit: int) -> bytes | None:
    """The chain as one stream of [exceptions, links], or as much of it as survives."""
    chain = _chain(exc)
    forms: dict[int, Any] = {}  # one form per exception: who is met twice stays one object
    root = _travelling(exc, limit, forms)
    if root is None:
        return None
    sent: list[Any] = [root]
    places = {id(exc): 0}
    room = limit - _size(root)
    for other in chain[1:]:
        form = _travelling(other, room, forms) or _stand_in(other)
        places[id(other)] = len(sent)
        sent.append(form)
        room -= _size(form)
        if room <= 0:
            break
    links = [
        (
            places[id(one)],
            places.get(id(one.__cause__)),
            places.get(id(one.__context__)),
            one.__suppress_context__,
        )
        for one in chain
        if id(one) in places
    ]
    for attempt in ((sent, links), ([root], [])):
        try:
            stream = _stream(attempt)
            if len(stream) <= limit and _rebuilt(stream) is not None:
                return stream
        except Exception:
            continue
    return None


def _chain(exc: BaseException) -> list[BaseException]:
    """The exception and those behind it (causes, contexts, members of groups), each once."""
    chain: list[BaseException] = []
    seen: set[int] = set()
    waiting: list[BaseException | None] = [exc]
    while waiting and len(chain) < _MAX_LINKS:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        chain.append(one)
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
    return chain


def _travelling(exc: BaseException, limit: int, known: dict[int, Any]) -> Any:
    """The exception itself, its parts, or its parts cut short: the first that survives; or None.

    known: the answers so far, by the identity of the exception.
    """
    if id(exc) in known:
        return known[id(exc)]
    forms: list[Any] = [exc]
    if isinstance(exc, BaseExceptionGroup):
        members = [_travelling(one, limit, known) or _stand_in(one) for one in exc.exceptions]
        forms = [_Parts(exc, (exc.message, members), exc.__dict__)]
    elif type(exc).__reduce__ is _PLAIN_REDUCE and type(exc).__reduce_ex__ is object.__reduce_ex__:
        forms.append(_Parts(exc, exc.args, exc.__dict__))
        if all(isinstance(arg, str) for arg in exc.args):
            args = tuple(_shortened(arg, _MAX_MESSAGE) for arg in exc.args)
            forms.append(_Parts(exc, args, {}))
    known[id(exc)] = None
    for form in forms:
        if _survives(form, exc, limit, exactly=len(forms) < 3 or form is not forms[2]):
            known[id(exc)] = form
            break
    return known[id(exc)]


def _survives(form: Any, exc: BaseException, limit: int, exactly: bool) -> bool:
    """Does the form come back as this type, and `exactly`: with this message?"""
    try:
        stream = _stream(form)
        if len(stream) > limit:
            return False
        back = pickle.loads(stream)
        if not isinstance(back, BaseException) or type(back).__name__ != type(exc).__name__:
            return False
        return not exactly or _message(back) == _message(exc)
    except Exception:
        return False


def _stand_in(exc: BaseException) -> TaskFailed:
    name = _type_name(exc)
    return TaskFailed(f"{name}: {_message(exc)}", type_name=name)


class _Parts:
    """Pickles as an exception of `kind` that is put together without its `__init__`."""

    def __init__(self, exc: BaseException, args: tuple[Any, ...], state: dict[str, Any]) -> None:
        self.parts = (type(exc), args, dict(state))

    def __reduce__(self) -> Any:
        return assemble, self.parts


def assemble(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    """An exception of `kind` with these args and attributes; its `__init__` is not called."""
    exc = kind.__new__(kind, *args)
    exc.args = args
    exc.__dict__.update(state)
    return exc


def _stream(obj: object) -> bytes:
    """One stream, nothing beside it: plain pickle first, cloudpickle for `__main__` classes.

    tblib, which Dask installs, puts a reducer for each exception class into copyreg's table; it
    loses what `__init__` sets (SystemExit.code), and adds a traceback that we send as text.
    """
    frames = pickle_frames(obj, {"exception": obj}, without=(BaseException,))
    if len(frames) > 1:
        raise CodecError("an exception with large buffers is sent as text")
    return bytes(frames[0])


def _size(form: Any) -> int:
    return len(_stream(form))


def _rebuilt(stream: bytes) -> BaseException | None:
    """The first exception of a stream of ours with its chain put back, or None."""
    try:
        exceptions, links = pickle.loads(stream)
        for place, cause, context, suppress in links:
            exc = exceptions[place]
            exc.__cause__ = None if cause is None else exceptions[cause]
            exc.__context__ = None if context is None else exceptions[context]
            exc.__suppress_context__ = suppress
        root = exceptions[0]
    except Exception:
        return None
    return root if isinstance(root, BaseException) else None


def _type_name(exc: BaseException) -> str:
    kind = type(exc)
    try:
        module, name = str(kind.__module__), str(kind.__qualname__)
    except Exception:
        return "Exception"
    return name if module in ("builtins", "__main__") else f"{module}.{name}"


def _message(exc: BaseException) -> str:
    try:
        return _shortened(str(exc), _MAX_MESSAGE)
    except Exception:
        return "<its str() raises>"


def _shortened(text: str, limit: int) -> str:
    limit = max(limit, 200)
    if len(text) <= limit:
        return text
    left_out = len(text) - limit
    return (
        f"{text[: limit * 2 // 3]}\n  ... ({left_out:,} characters left out) ...\n"
        f"{text[-(limit // 3) :]}"
    )
