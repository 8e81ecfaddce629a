"""`gather`: futures nested in whatever way, replaced by their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from zfabric.client.future import FAILED, Future
from zfabric.client.lazy_map import LazyMap
from zfabric.client.reading import value_of
from zfabric.client.waiting import futures_of, sleep_until
from zfabric.codec.serialise import loads_inline
from zfabric.core.submitter import LOADED
from zfabric.errors import UsageError
from zfabric.messages import STORED, VALUE

if TYPE_CHECKING:
    from zfabric.client.client import Client

SKIPPED = object()
"""Stands for a failed future until its container is built without it."""


def gather(client: Client, nested: Any, errors: str) -> Any:
    """The same nesting with values in place of futures. See Client.gather."""
    if errors not in ("raise", "skip"):
        raise UsageError(f"errors={errors!r}: it is 'raise' or 'skip'")
    skip = errors == "skip"
    if isinstance(nested, (Iterator, LazyMap)):
        nested = list(nested)
    if type(nested) is list and all(isinstance(each, Future) for each in nested):
        values = _flat(client, nested, skip)
        return [v for v in values if v is not SKIPPED] if skip else values
    futures = list(dict.fromkeys(futures_of(nested)))
    found = dict(zip(futures, _flat(client, futures, skip), strict=True))
    built = _rebuilt(nested, found)
    return None if built is SKIPPED else built


def _flat(client: Client, futures: list[Future], skip: bool) -> list[Any]:
    """Their values, in order. Stored ones are fetched side by side."""
    values: list[Any] = []
    append = values.append
    stored = []
    for future in futures:
        outcome = future._outcome
        payload = outcome.payload
        if outcome.status == VALUE and payload is not None:
            value = loads_inline(payload)
            outcome.value = value
            outcome.status = LOADED
            outcome.payload = None
            append(value)
            continue
        if outcome.status != LOADED:
            sleep_until(client, outcome, None)
        if outcome.status == STORED:
            client._values.begin_fetch(future)
            stored.append((len(values), future))
            append(None)
        else:
            append(_value_or_skipped(future, skip))
    for place, future in stored:
        values[place] = _value_or_skipped(future, skip)
    return values


def _value_or_skipped(future: Future, skip: bool) -> Any:
    outcome = future._outcome
    try:
        return value_of(future)
    except BaseException:  # a task may have raised SystemExit
        if skip and outcome.status in FAILED:
            return SKIPPED
        raise


def _rebuilt(nested: Any, found: Mapping[Future, Any]) -> Any:
    if isinstance(nested, Future):
        return found[nested]
    kind = type(nested)
    if kind is dict:
        pairs = [(key, _rebuilt(item, found)) for key, item in nested.items()]
        return {key: item for key, item in pairs if item is not SKIPPED}
    if kind in (list, tuple, set, frozenset):
        items = [_rebuilt(item, found) for item in nested]
        return kind([item for item in items if item is not SKIPPED])
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):  # a named tuple keeps its fields
        return kind(*[_rebuilt(item, found) for item in nested])
    return nested
