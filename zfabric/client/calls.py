"""From a call to a queued row: what `submit` and `map` do, all of it in the user's thread."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, WeakValueDictionary, finalize

from zfabric.client import misuse
from zfabric.client.chunks import Chunk, Initialised
from zfabric.client.future import Future, NamedFuture
from zfabric.client.repeats import Repeats
from zfabric.client.sharing import Shared
from zfabric.codec.arguments import EMPTY, dump_call, dump_rows
from zfabric.codec.functions import DumpedFunction, dump_function, largest_captures
from zfabric.codec.serialise import Buffer, nbytes_of, pack
from zfabric.core.submitter import Outcome, Row
from zfabric.errors import UsageError
from zfabric.messages import TaskOptions

if TYPE_CHECKING:
    from zfabric.client.client import Client

FIRST_ROWS = 64
"""Rows of a map that leave first, so that the workers begin while the rest is pickled."""

MOST_ROWS = 2048
"""Rows of a map that are queued at once, later on."""

KEPT_CARRIERS = 16
"""Large functions that are kept as values. One that changes with each call, such as a method of
an object that does, would fill the workers' memory; tasks that need one keep it themselves."""

MAX_DEPENDENCIES = 300_000
"""Of one task: what fits a control message."""


class Calls:
    """Makes rows for one client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._io = client._io
        self._submitter = client._submitter
        self._argument_limit = client._settings.argument_limit
        self._function_limit = client._settings.batch_bytes
        self._named: WeakValueDictionary[str, Future] = WeakValueDictionary()
        self.kept: dict[str, Future] | None = None
        """Of a named run: the futures with keys, which live until they are released."""
        self._large_functions: dict[int, Future] = {}
        self.repeats = Repeats(client._values, self._argument_limit)
        client._io.tidy = WeakMethod(self.repeats.tidy)

    def submit(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> Future:
        """Queue one call. key: of a NamedFuture."""
        submitter = self._submitter
        if submitter.closed_text:
            misuse.refuse_closed(self._client)
        if not callable(fn):
            misuse.refuse_uncallable(fn)
        function = dump_function(fn)
        fid = function[0]
        if fid not in submitter.functions and not self._learn(function):
            return self.submit(call_it, (self._carrier(fn, fid), *args), kwargs, options, key)
        frames, deps = dump_call(args, kwargs)
        payload: Any = frames[0]
        if deps:
            misuse.refuse_foreign(self._client, deps)
        if len(frames) != 1 or len(payload) > self._argument_limit:
            again = self.repeats.call(args, kwargs, frames)
            if again is None:
                payload, deps = self._payload(frames, deps)
            else:
                payload, deps, held = again
        outcome = submitter.new_outcome(fid)
        if key is None:
            future = Future(self._client, outcome)
        else:
            future = NamedFuture(self._client, outcome, key)
        submitter.rows.append((outcome.id, fid, payload, deps or None, options))
        if not payload:
            submitter.released.append(deps[-1])  # its task keeps it from now on
        if self._io.sleeping:
            self._io.wake()
        if submitter.closed_text:  # just now, by another thread
            misuse.refuse_closed(self._client)
        return future

    def submit_named(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: str | None,
        options: TaskOptions | None,
    ) -> Future:
        """Queue one call unless a future with its key is alive: then that one.

        key: None computes it from the function and the arguments (`pure=True`).
        """
        if not callable(fn):
            misuse.refuse_uncallable(fn)
        if key is None:
            key = pure_key(fn, args, kwargs)
        client = self._client
        with client._lock:
            found = self._named.get(key)
            if found is None or found._outcome.id not in self._submitter.outcomes:
                found = self.submit(fn, args, kwargs, options, key)
                self._named[key] = found
                if self.kept is not None and options is not None and options.key:
                    self.kept[key] = found
        return found

    def adopt(self, future: NamedFuture) -> Future:
        """A task that this client did not submit itself."""
        self._named[future.key] = future
        return future

    def map(
        self,
        fn: Callable[..., Any],
        rows: Iterator[tuple[Any, ...]],
        options: TaskOptions | None = None,
        still: bool = False,
    ) -> list[Future]:
        """Queue a call for each row of positional arguments.

        still: taking the next row changes nothing in those before it.
        """
        submitter, client = self._submitter, self._client
        if submitter.closed_text:
            misuse.refuse_closed(client)
        if not callable(fn):
            misuse.refuse_uncallable(fn, "map")
        function = dump_function(fn)
        if function.id not in submitter.functions and not self._learn(function):
            carrier = self._carrier(fn, function.id)
            return self.map(call_it, ((carrier, *row) for row in rows), options, still)
        futures: list[Future] = []
        shared = Shared(client._values, self._argument_limit)
        n_rows = FIRST_ROWS
        limit = self._argument_limit
        while True:
            batch = list(islice(rows, n_rows))
            dumped = dump_rows(batch)
            blobs: list[Any] = dumped.blobs
            if not blobs:
                return futures
            if submitter.closed_text:
                misuse.refuse_closed(client)
            if dumped.frames or max(map(len, blobs)) > limit:
                if not still:
                    shared.forget()
                shared.replace(batch, dumped)
            outcomes = submitter.new_outcomes(function.id, len(blobs))
            futures += [Future(client, outcome) for outcome in outcomes]
            if dumped.dependencies or dumped.frames or max(map(len, blobs)) > limit:
                queue = self._mixed_rows(outcomes, dumped, options)
            else:
                fid = function.id
                queue = [
                    (outcome.id, fid, blob, None, options)
                    for outcome, blob in zip(outcomes, blobs, strict=True)
                ]
            submitter.rows.extend(queue)
            if dumped.frames:
                submitter.released.extend([row[3][-1] for row in queue if row[3] and not row[2]])
            if self._io.sleeping:
                self._io.wake()
            n_rows = min(2 * n_rows, MOST_ROWS)

    # --- what few calls need ------------------------------------------------------------------

    def _mixed_rows(
        self, outcomes: Sequence[Outcome], dumped: Any, options: TaskOptions | None
    ) -> list[Row]:
        queue: list[Row] = []
        for number, (outcome, blob) in enumerate(zip(outcomes, dumped.blobs, strict=True)):
            deps = dumped.dependencies.get(number, EMPTY)
            if deps:
                misuse.refuse_foreign(self._client, deps)
            payload, deps = self._payload(dumped.frames.get(number) or [blob], deps)
            queue.append((outcome.id, outcome.fn, payload, deps or None, options))
        return queue

    def _payload(
        self, frames: Sequence[Buffer], deps: Sequence[int]
    ) -> tuple[bytes, Sequence[int]]:
        """The row's payload, and its dependencies: large arguments become the last of them."""
        if nbytes_of(frames) <= self._argument_limit:
            payload = pack(frames)
        else:
            payload, deps = b"", [*deps, self._client._values.put_arguments(frames)]
        if len(deps) > MAX_DEPENDENCIES:
            raise UsageError(
                f"a call with {len(deps)} futures among its arguments; {MAX_DEPENDENCIES} is the"
                " most: combine them in a tree of tasks"
            )
        return payload, deps

    def _learn(self, function: DumpedFunction) -> bool:
        """Note a function that is used for the first time. False: too large to travel as one."""
        if len(function.blob) > self._function_limit:
            return False
        with self._client._lock:
            self._submitter.learn((function.id, function.name, function.blob))
        return True

    def _carrier(self, fn: Callable[..., Any], fid: int) -> Future:
        """A function with something big in its closure travels as a value: once, as data."""
        carrier = self._large_functions.get(fid)
        if carrier is None or carrier.task_id not in self._submitter.outcomes:
            if not isinstance(
                fn, (Chunk, Initialised)
            ):  # a library made that; nobody can change it
                _warn_of_size(fn)
            while len(self._large_functions) >= KEPT_CARRIERS:
                self._large_functions.pop(next(iter(self._large_functions)), None)
            carrier = self._large_functions[fid] = self._client._values.scatter([fn])[0]
            with suppress(TypeError):  # not every callable can be watched: then for good
                finalize(fn, self._large_functions.pop, fid, None).atexit = False
        return carrier


def _warn_of_size(fn: Callable[..., Any]) -> None:
    names = ", ".join(f"{name} ({n / 1e6:.3g} MB)" for name, n in largest_captures(fn, 2))
    warnings.warn(
        f"the function {getattr(fn, '__qualname__', fn)} carries large data: {names}; it"
        " is sent once and kept, but x = client.scatter(data) and submit(f, x) says so",
        UserWarning,
        stacklevel=6,
    )


def call_it(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs), where fn came as a value."""
    return fn(*args, **kwargs)


def pure_key(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The same text for the same function and equal arguments, as far as pickle tells."""
    function = dump_function(fn)
    frames, deps = dump_call(args, dict(sorted(kwargs.items())))
    digest = blake2b(function.id.to_bytes(8, "little"), digest_size=16)
    for frame in frames:
        digest.update(frame)
    digest.update(repr(list(deps)).encode())
    return f"{function.name}-{digest.hexdigest()}"
