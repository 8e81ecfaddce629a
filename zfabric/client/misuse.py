"""Calls that make no sense, each with one text that says what to do instead."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from zfabric.config import Settings
from zfabric.errors import ClientClosed, ConfigError, UsageError
from zfabric.messages import TaskOptions

if TYPE_CHECKING:
    from zfabric.client.client import Client

ENDLESS = (itertools.count, itertools.cycle)


def refuse_uncallable(fn: Any, verb: str = "submit") -> None:
    """Raise UsageError, as `fn` is no function."""
    from zfabric.codec.references import Reference

    if inspect.iscoroutine(fn):
        name = getattr(fn, "__qualname__", "f")
        fn.close()  # else Python warns that it was never awaited
        raise UsageError(
            f"{verb}({name}(...)) was given a coroutine object: give the function and its"
            f" arguments, {verb}({name}, ...); the worker runs its event loop"
        )
    if isinstance(fn, Reference):
        raise UsageError(
            f"{verb}() was given a future where a function belongs: futures go among the"
            f" arguments, {verb}(f, future)"
        )
    raise UsageError(
        f"{verb}() was given {_short(fn)}, of type {type(fn).__name__}, where a function"
        f" belongs: write {verb}(f, x) instead of {verb}(f(x))"
    )


def refuse_foreign(client: Client, dependencies: Sequence[int]) -> None:
    """Raise UsageError where one of these tasks is not the client's own and alive."""
    table = client._submitter.outcomes
    base = client._submitter.number
    for task in dependencies:
        if task in table:
            continue
        if task >> 40 != base:
            raise UsageError(
                "an argument is a future of another client (or of a session that the broker has"
                " lost); pass its .result(), or submit through the client that made it"
            )
        raise UsageError("an argument is a future that was released; its value is gone")


def refuse_closed(client: Client) -> None:
    """Raise ClientClosed, as nothing can be called on this client any more."""
    if client._forked:
        raise ClientClosed(
            "this client was made before os.fork(), and its thread and sockets stayed in the"
            " parent process; make a Client of its own in the child"
        )
    why = "" if client._closed else client._submitter.closed_text
    raise ClientClosed(f"this client is closed{f' ({why})' if why else ''}; make a new Client")


def refuse_endless(iterables: Iterable[Any]) -> None:
    """Raise UsageError for a map that would never end."""
    if all(isinstance(each, ENDLESS) for each in iterables):
        raise UsageError(
            "map() over an endless iterator would never return: give max_inflight=, and it"
            " returns a lazy iterator of futures"
        )


MAX_TEXT = 4096
MAX_RESOURCES = 64
"""What the wire takes; beyond that the broker would end the session."""


def options_of(
    key: str | None,
    retries: int,
    priority: int,
    resources: Mapping[str, float] | None,
    workers: str | Iterable[str] | None,
    timeout: float | None = None,
    retry_on: Any = (),
    idempotent: bool = True,
    must_fit: bool = True,
) -> TaskOptions | None:
    """What a call asks for beyond the defaults, None when nothing. Raises UsageError."""
    some = key or retries or priority or resources or workers or retry_on
    if not some and timeout is None and idempotent is True and must_fit is True:
        return None
    if key is not None and (not isinstance(key, str) or len(key) > MAX_TEXT):
        raise UsageError(f"key={_short(key)}: it is a text of at most {MAX_TEXT} characters")
    if type(retries) is not int or not 0 <= retries <= 2**31:
        raise UsageError(f"retries={retries!r}: it is how often to run again, 0 to 2**31")
    if type(priority) is not int or not -(2**31) <= priority <= 2**31:
        raise UsageError(f"priority={priority!r}: it is an integer, higher runs sooner")
    wanted: dict[str, float] = {}
    if resources is not None and not isinstance(resources, Mapping):
        raise UsageError(f"resources={_short(resources)}: it is like {{'GPU': 1}}")
    for name, amount in (resources or {}).items():
        usable = isinstance(name, str) and isinstance(amount, (int, float))
        if not usable or not 0 <= amount < 1e15 or len(resources or {}) > MAX_RESOURCES:
            raise UsageError(f"resources={_short(resources)}: it is like {{'GPU': 1}}")
        wanted[name] = float(amount)
    names = (workers,) if isinstance(workers, str) else _several(workers)
    if not all(isinstance(name, str) and len(name) <= MAX_TEXT for name in names):
        raise UsageError(f"workers={_short(workers)}: it is a worker's name or several")
    limit_s = _limit(timeout)
    kinds = _exception_names(retry_on)
    if kinds and not retries:
        raise UsageError("retry_on= says after which exceptions to retry: give retries= as well")
    if type(idempotent) is not bool:
        raise UsageError(f"idempotent={_short(idempotent)}: it is True or False")
    if not idempotent and retries:
        raise UsageError("idempotent=False is for what must not run twice: give no retries=")
    if type(must_fit) is not bool:
        raise UsageError(f"must_fit={_short(must_fit)}: it is True or False")
    return TaskOptions(
        priority, retries, wanted, names, key or "", limit_s, kinds, idempotent, must_fit
    )


def _several(workers: Any) -> tuple[Any, ...]:
    try:
        return tuple(workers or ())
    except TypeError:
        return (workers,)  # which is no name, as its caller says


def _limit(timeout: Any) -> float:
    if timeout is None:
        return 0.0
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < 1e9:
        raise UsageError(
            f"timeout={_short(timeout)}: seconds that the task may run, above 0 and"
            " below 1e9; without it there is no limit"
        )
    return float(timeout)


def _exception_names(retry_on: Any) -> tuple[str, ...]:
    kinds = retry_on if isinstance(retry_on, (tuple, list)) else (retry_on,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise UsageError(
                f"retry_on={_short(retry_on)}: it is an exception class or a tuple of several"
            )
    return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


OPTIONS = ("address", "n_workers", "slots", "kind", "processes", "memory_limit", "name", "timeout")


def refuse_unknown_options(given: Mapping[str, object]) -> None:
    """Raise ConfigError for a keyword of Client() that is like one of its own.

    Settings does so for those that are like a setting, or like nothing.
    """
    known = {field.name for field in fields(Settings)}
    for name in given:
        near = difflib.get_close_matches(name, [*OPTIONS, *known], 1)
        if name not in known and near and near[0] in OPTIONS:
            raise ConfigError(f"unknown option {name} of Client(); did you mean {near[0]}?")


def refuse_local_options(address: object, **options: Any) -> None:
    """Raise ConfigError where options of a local fabric come with an address."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)} would start a local fabric, but the address {address} says that"
            " there is one: give either"
        )


def _short(thing: Any) -> str:
    try:
        text = repr(thing)
    except Exception:
        return "an object"
    return text if len(text) <= 60 else text[:57] + "..."
