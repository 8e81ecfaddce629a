"""`DaskScheduler`: a client as Dask sees it. `get`, `compute` and `persist`.

It is what `client.get` gives, and what stands in Dask's configuration: callable, as a scheduler is,
and with `persist`, which Dask asks for. It is not a bound method of the client, and its name does
not contain "Client": libraries take that for dask.distributed's and ask it for the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from zfabric.client import misuse
from zfabric.client.future import FAILED, Future
from zfabric.errors import ClientClosed

if TYPE_CHECKING:
    from zfabric.client.client import Client
    from zfabric.client.collections.graphs import Graph
    from zfabric.client.collections.habits import Habits
    from zfabric.client.collections.held import DaskFuture

STALE_S = 1.0
"""Age at which the number of slots is asked for again."""


class DaskScheduler:
    """Runs Dask graphs on a client.

    client_of: gives the client, None when it is gone.
    """

    asynchronous = False

    def __init__(self, client_of: Callable[[], Client | None]) -> None:
        self._client_of = client_of

    @property
    def client(self) -> Client:
        """The client that runs the graphs. Raises ClientClosed when there is none any more."""
        client = self._client_of()
        if client is None:
            raise ClientClosed("the client that was Dask's scheduler is gone; make a new Client")
        if client._submitter.closed_text:
            misuse.refuse_closed(client)
        return client

    @property
    def is_open(self) -> bool:
        """Whether there is a client to run graphs."""
        client = self._client_of()
        return client is not None and not client._submitter.closed_text

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        return self.get(dsk, keys, **kwargs)

    def get(self, dsk: Any, keys: Any, *, sync: bool = True, **kwargs: Any) -> Any:
        """The values of keys: one key, or nested lists of them, which keep their nesting.

        dsk: a dict, a HighLevelGraph or one of Dask's expressions.
        sync: False gives futures in place of the values.
        kwargs: priority, retries, resources, workers as in Client.submit; others, which other
            schedulers know, are ignored.
        """
        wanted = list(dict.fromkeys(_flat(keys)))
        found = self.state.send(dsk, wanted, kwargs, () if sync else wanted)
        if not sync:
            return _nested(keys, {key: held.future for key, held in found.items()})
        futures = list(dict.fromkeys(held.future for held in found.values()))
        values = dict(zip(futures, self.client.gather(futures), strict=True))
        return _nested(
            keys,
            {
                key: values[held.future] if held.item is None else values[held.future][held.item]
                for key, held in found.items()
            },
        )

    def compute(
        self,
        collections: Any,
        *,
        sync: bool = False,
        optimize_graph: bool = True,
        traverse: bool = True,
        **kwargs: Any,
    ) -> Any:
        """A future of each collection's value; for a list of them, a list.

        sync: True gives the values.  traverse: look into lists and dicts for collections.
        What is no collection is given back as it is.  kwargs: as in get.
        """
        import dask

        def schedule(expr: Any, keys: Any, **_: Any) -> Any:
            return self.get(expr, list(keys), sync=False, **kwargs)

        def start(part: list[Any]) -> list[Any]:
            return list(
                dask.compute(
                    *part, scheduler=schedule, optimize_graph=optimize_graph, traverse=traverse
                )
            )

        single = not isinstance(collections, (list, tuple, set, frozenset))
        found = _by_kind([collections] if single else list(collections), start)
        if sync:
            found = self.client.gather(found)
        return found[0] if single else found

    def persist(
        self,
        collections: Any,
        *,
        optimize_graph: bool = True,
        traverse: bool = True,
        **kwargs: Any,
    ) -> Any:
        """The same kind of collection, its data left on the workers; for a list, a list.

        The data is there until the last collection that came of it is gone.  kwargs: as in get.
        """
        import dask

        def schedule(expr: Any, keys: Any, **_: Any) -> Any:
            flat = list(keys)
            found = self.state.hold(expr, flat, kwargs)
            return [found[key] for key in flat]

        def start(part: list[Any]) -> list[Any]:
            return list(
                dask.persist(
                    *part, scheduler=schedule, optimize_graph=optimize_graph, traverse=traverse
                )
            )

        single = not isinstance(collections, (list, tuple, set, frozenset))
        found = _by_kind([collections] if single else list(collections), start)
        return found[0] if single else found

    @property
    def state(self) -> State:
        """What the client remembers of the graphs that it has sent."""
        client = self.client
        with client._lock:
            if client._graphs is None:
                client._graphs = State(client)
        state: State = client._graphs
        return state


class State:
    """One client's persisted keys, and what it knows of the fabric."""

    def __init__(self, client: Client) -> None:
        from weakref import ref

        self._client = ref(client)
        self._held: WeakValueDictionary[Hashable, DaskFuture] = WeakValueDictionary()
        self._habits: Habits | None = None
        self._n_slots = 1
        self._looked_at = -STALE_S

    def send(
        self,
        dsk: Any,
        wanted: Sequence[Hashable],
        options: dict[str, Any],
        alone: Sequence[Hashable] = (),
    ) -> dict[Hashable, DaskFuture]:
        """Queue the part of a graph that the wanted keys need; a DaskFuture for each."""
        from zfabric.client.collections.graphs import Graph
        from zfabric.client.collections.habits import SMALL
        from zfabric.client.collections.sending import send

        client = self._client()
        assert client is not None  # whoever calls holds it
        graph = Graph(dsk, wanted, self._find, self._held.get)
        if 1 < len(graph.nodes) <= SMALL and not alone:
            return self._send_small(client, graph, options)
        graph.arrange()
        n_slots = self._slots(client) if len(graph.nodes) > SMALL else SMALL
        return send(client, graph, n_slots, options, alone)

    def _send_small(
        self, client: Client, graph: Graph, options: dict[str, Any]
    ) -> dict[Hashable, DaskFuture]:
        """As one row where graphs of its shape have shown that this is faster."""
        from zfabric.client.collections.habits import SMALL, Habits, is_light, shape_of
        from zfabric.client.collections.sending import send

        if self._habits is None:
            self._habits = Habits()
        began = perf_counter()
        shape = shape_of(graph.nodes, len(graph.names))
        n_tasks = len(graph.nodes)
        together = is_light(graph.known.values()) and self._habits.is_together(
            shape, n_tasks, self._slots(client)
        )
        if not together:
            graph.arrange()
        found = send(client, graph, SMALL, options, together=together)
        light = self._habits.gives_little(shape)
        before = {held.future for held in graph.known.values()}
        fresh = set()
        for held in found.values():
            if held.future not in before:
                held.light = light
                fresh.add(held.future)
        self._habits.watch(shape, together, began, fresh)
        return found

    def hold(
        self, dsk: Any, wanted: Sequence[Hashable], options: dict[str, Any]
    ) -> dict[Hashable, DaskFuture]:
        """As send, and while the DaskFutures live, other graphs that name these keys use them."""
        from zfabric.client.collections.held import DaskFuture

        found = {}
        for key, held in self.send(dsk, wanted, options).items():
            named = held
            if held.key != key:
                named = DaskFuture(key, held.future, held.item)
                named.light = held.light
            found[key] = self._held[key] = named
        return found

    def _find(self, key: Hashable) -> DaskFuture | None:
        held = self._held.get(key)
        if held is None or held.future._outcome.status in FAILED:
            return None  # one that failed is computed anew
        return held

    def _slots(self, client: Client) -> int:
        now = monotonic()
        if now - self._looked_at > STALE_S:
            self._n_slots = sum(worker["slots"] for worker in client.info()["workers"])
            self._looked_at = now
        return self._n_slots


def futures_of_collection(collection: Any) -> list[Future]:
    """The futures that a persisted collection stands on, each once; [] for anything else."""
    from zfabric.client.collections.held import futures_in

    return list(futures_in(collection))


def _by_kind(items: list[Any], start: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """start(items), all at once where they are of one type, else one by one.

    Dask gives a mixture of arrays and delayed values back in the wrong order (seen in 2026.8).
    """
    if len({type(item) for item in items}) == 1:
        return start(items)
    return [start([item])[0] for item in items]


def _flat(keys: Any) -> Any:
    if isinstance(keys, list):
        for key in keys:
            yield from _flat(key)
    else:
        yield keys


def _nested(keys: Any, found: dict[Hashable, Any]) -> Any:
    if isinstance(keys, list):
        return [_nested(key, found) for key in keys]
    return found[keys]
