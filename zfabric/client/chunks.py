"""Many small calls as few tasks, and what has to run in a slot before any of them.

These objects travel as functions: by content, so that one that is sent again and again (a sampler
calls the same likelihood in every step) is a known id from the second time on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor
from time import perf_counter
from typing import Any

from zfabric.runtime import slot_context

MOST_TOKENS = 256
"""Initializers that a slot remembers to have run."""


class InitializerFailed(BrokenExecutor):
    """The initializer of an executor or a pool raised in a slot: none of its calls can run there.

    Its `__cause__` is what it raised.
    """


class Chunk:
    """fn for a run of items: (seconds that it took, [fn(item) for each item]).

    star: the items are tuples of arguments.
    """

    __slots__ = ("__weakref__", "fn", "star")

    def __init__(self, fn: Callable[..., Any], star: bool = False) -> None:
        self.fn = fn
        self.star = star

    def __call__(self, items: Iterable[Any]) -> tuple[float, list[Any]]:
        fn = self.fn
        began = perf_counter()
        values = [fn(*item) for item in items] if self.star else [fn(item) for item in items]
        return perf_counter() - began, values


class Initialised:
    """fn, behind an initializer that runs once in each slot.

    token: of the executor or pool that it belongs to; unique.
    """

    __slots__ = ("__weakref__", "fn", "initargs", "initializer", "token")

    def __init__(
        self,
        fn: Callable[..., Any],
        token: str,
        initializer: Callable[..., object],
        initargs: tuple[Any, ...],
    ) -> None:
        self.fn = fn
        self.token = token
        self.initializer = initializer
        self.initargs = initargs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _begin(self.token, self.initializer, self.initargs)
        return self.fn(*args, **kwargs)


_slot = threading.local()
"""A slot runs its tasks in one thread, whether it is a process of its own or not."""


def _begin(token: str, initializer: Callable[..., object], initargs: tuple[Any, ...]) -> None:
    begun: dict[str, BaseException | None] = _slot.__dict__.setdefault("begun", {})
    if token not in begun:
        while len(begun) >= MOST_TOKENS:
            del begun[next(iter(begun))]
        try:
            initializer(*initargs)
        except Exception as exc:
            begun[token] = exc
        else:
            begun[token] = None
            context = slot_context.current()
            if context is not None:
                context.settle()
    error = begun[token]
    if error is not None:
        raise InitializerFailed(
            f"the initializer failed in this slot: {type(error).__name__}: {error}"
        ) from error
