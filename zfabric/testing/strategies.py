"""Hypothesis strategies: any message that the wire can carry, and damage to its frames.

Needs hypothesis (the `test` extra). A message drawn here is equal to what `wire.decode` makes of
its frames: columns are lists, as the reader makes them.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from zfabric import messages as m

u64 = st.integers(0, (1 << 64) - 1)
value_sizes = st.integers(0, 1 << 46)
u63 = st.integers(0, (1 << 63) - 1)
texts = st.text(max_size=40)
blobs = st.binary(max_size=80)
amounts = st.one_of(st.integers(0, 1 << 40), st.floats(0, 1e14, allow_nan=False))
resources = st.dictionaries(texts, amounts, max_size=4)
functions = st.lists(st.tuples(u64, texts, blobs), max_size=3)
id_columns = st.lists(u64, max_size=8)
options = st.builds(
    m.TaskOptions,
    priority=st.integers(-(1 << 31), 1 << 31),
    retries=st.integers(0, 1 << 31),
    resources=resources,
    workers=st.lists(texts, max_size=3).map(tuple),
    key=texts,
    timeout_s=st.floats(0, 1e8),
    retry_on=st.lists(texts, max_size=3).map(tuple),
    idempotent=st.booleans(),
)
places = st.tuples(u63, st.lists(st.tuples(u63, texts).map(list), max_size=3)).map(list)
dependencies = st.one_of(
    st.tuples(u64, st.just(m.INLINE), blobs),
    st.tuples(u64, st.just(m.LOCAL), u63),
    st.tuples(u64, st.just(m.REMOTE), places),
)


def columns(n: int, entries: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """A column of n entries."""
    return st.lists(entries, min_size=n, max_size=n)


def sparse(n: int, entries: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[int, Any]]]:
    """(row, entry) for some of n rows, ascending."""
    if not n:
        return st.just([])
    return st.dictionaries(st.integers(0, n - 1), entries, max_size=4).map(
        lambda chosen: sorted(chosen.items(), key=lambda item: item[0])
    )


@st.composite
def _submits(draw: st.DrawFn) -> m.Submit:
    n = draw(st.integers(0, 6))
    return m.Submit(
        draw(functions),
        draw(columns(n, u64)),
        draw(columns(n, u64)),
        draw(columns(n, blobs)),
        draw(sparse(n, st.lists(u64, max_size=5))),
        draw(sparse(n, options)),
    )


@st.composite
def _runs(draw: st.DrawFn) -> m.Run:
    n = draw(st.integers(0, 6))
    return m.Run(
        draw(functions),
        draw(columns(n, u64)),
        draw(columns(n, u64)),
        draw(columns(n, u64)),
        draw(columns(n, blobs)),
        draw(sparse(n, st.lists(dependencies, max_size=4))),
        draw(sparse(n, st.floats(0, 1e8))) or (),
    )


@st.composite
def _dones(draw: st.DrawFn) -> m.Done:
    n = draw(st.integers(0, 6))
    statuses = bytes(draw(columns(n, st.integers(0, m.N_STATUSES - 1))))
    payloads = [
        draw(value_sizes).to_bytes(8, "little") if status == m.STORED else draw(blobs)
        for status in statuses
    ]
    return m.Done(draw(columns(n, u64)), draw(columns(n, u64)), statuses, payloads, draw(u63))


@st.composite
def _returns(draw: st.DrawFn) -> m.Returned:
    n = draw(st.integers(0, 6))
    return m.Returned(draw(columns(n, u64)), draw(columns(n, u64)), draw(u63))


@st.composite
def _results(draw: st.DrawFn) -> m.Results:
    n = draw(st.integers(0, 6))
    statuses = bytes(draw(columns(n, st.integers(0, m.N_STATUSES - 1))))
    return m.Results(draw(columns(n, u64)), statuses, draw(columns(n, blobs)))


@st.composite
def _gives(draw: st.DrawFn) -> m.Give:
    n = draw(st.integers(0, 6))
    return m.Give(draw(columns(n, u64)), draw(columns(n, blobs)))


@st.composite
def _explained(draw: st.DrawFn) -> m.Explained:
    n = draw(st.integers(0, 6))
    return m.Explained(
        draw(u63), draw(columns(n, u64)), draw(columns(n, texts)), draw(columns(n, texts))
    )


@st.composite
def _outputs(draw: st.DrawFn) -> m.Output:
    n = draw(st.integers(0, 6))
    return m.Output(
        draw(columns(n, u64)), draw(columns(n, u64)), draw(columns(n, u64)), draw(columns(n, blobs))
    )


@st.composite
def _registers(draw: st.DrawFn) -> m.Register:
    n = draw(st.integers(0, 6))
    holders = st.lists(u64, max_size=3)
    sizes = draw(columns(n, value_sizes))
    return m.Register(draw(columns(n, u64)), sizes, draw(columns(n, holders)))


@st.composite
def _inventories(draw: st.DrawFn) -> m.Inventory:
    n, k = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    return m.Inventory(
        draw(columns(n, u64)),
        draw(columns(n, u64)),
        draw(columns(k, u64)),
        draw(columns(k, value_sizes)),
        draw(u63),
        draw(st.integers(0, n)),
    )


_parts = (
    u63,
    st.integers(0, 1 << 48),
    st.lists(st.integers(0, 1 << 48), max_size=4),
    blobs,
    st.binary(max_size=24),
)
_seconds = st.floats(0, 1e8, allow_nan=False)

BY_KIND: dict[type, st.SearchStrategy[Any]] = {
    m.Hello: st.builds(
        m.Hello,
        role=st.sampled_from([m.CLIENT, m.WORKER]),
        name=texts,
        zfabric=texts,
        python=texts,
        host=texts,
        pid=u63,
        depth=st.integers(0, 1 << 16),
        slots=st.integers(0, 1 << 16),
        threads=st.booleans(),
        resources=resources,
        data_address=texts,
        previous=u63,
        acked=u63,
        run=texts,
    ),
    m.Welcome: st.builds(
        m.Welcome,
        st.integers(1, 1 << 23),
        texts,
        texts,
        u63,
        _seconds,
        _seconds,
        st.booleans(),
        u63,
    ),
    m.Refuse: st.builds(m.Refuse, texts, texts),
    m.Beat: st.builds(m.Beat, u63, st.lists(u64, max_size=8).map(tuple), u63),
    m.Nack: st.builds(m.Nack, u63),
    m.Relay: st.builds(
        m.Relay, st.integers(1, (1 << 63) - 1), st.lists(blobs, max_size=6).map(tuple)
    ),
    m.Bye: st.builds(m.Bye, texts),
    m.Submit: _submits(),
    m.Release: st.builds(m.Release, id_columns),
    m.Cancel: st.builds(m.Cancel, id_columns),
    m.Retry: st.builds(m.Retry, id_columns),
    m.Register: _registers(),
    m.Ask: st.builds(m.Ask, u63, texts, id_columns, texts),
    m.Answer: st.builds(m.Answer, u63, blobs),
    m.Alarm: st.builds(m.Alarm, texts),
    m.Query: st.builds(m.Query, u63, texts, id_columns, texts),
    m.Reply: st.builds(m.Reply, u63, blobs),
    m.Acquire: st.builds(m.Acquire, u63, texts, st.booleans()),
    m.Unlock: st.builds(m.Unlock, u63),
    m.Locked: st.builds(m.Locked, u63, st.booleans()),
    m.Results: _results(),
    m.Run: _runs(),
    m.Recall: st.builds(m.Recall, id_columns),
    m.Drop: st.builds(m.Drop, id_columns),
    m.Give: _gives(),
    m.Free: st.builds(m.Free, id_columns),
    m.Forget: st.builds(m.Forget, id_columns),
    m.Admit: st.builds(
        m.Admit, st.lists(st.binary(min_size=32, max_size=32), max_size=5).map(tuple)
    ),
    m.Done: _dones(),
    m.Returned: _returns(),
    m.Missing: st.builds(m.Missing, id_columns),
    m.Holds: st.builds(m.Holds, id_columns),
    m.Explain: st.builds(m.Explain, u63, id_columns),
    m.Explained: _explained(),
    m.Output: _outputs(),
    m.Inventory: _inventories(),
    m.Fetch: st.builds(
        m.Fetch,
        u63,
        u63,
        u63,
        st.lists(st.text(max_size=12), max_size=3).map(tuple),
        u63,
        u63,
        texts,
    ),
    m.Chunk: st.builds(m.Chunk, *_parts),
    m.Put: st.builds(m.Put, *_parts),
    m.PutDone: st.builds(m.PutDone, u63, texts),
    m.NotHere: st.builds(m.NotHere, u63, st.lists(st.tuples(u63, texts), max_size=3).map(tuple)),
    m.LinksWanted: st.builds(m.LinksWanted, u63),
    m.LinksTold: st.builds(m.LinksTold, u63, blobs),
}
"""Each kind of message, and what draws one."""

messages = st.one_of(*BY_KIND.values())
"""Any message."""


@st.composite
def damaged(draw: st.DrawFn, frames: list[bytes]) -> list[bytes]:
    """These frames after some harm: flipped, cut, stretched, swapped, lost or doubled."""
    frames = [bytes(frame) for frame in frames]
    for _ in range(draw(st.integers(1, 3))):
        which = draw(st.integers(0, len(frames) - 1)) if frames else 0
        harm = draw(st.sampled_from(["flip", "cut", "grow", "swap", "lose", "double", "splice"]))
        if not frames:
            break
        frame = frames[which]
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        if harm == "flip" and frame:
            flipped = bytes([frame[at] ^ draw(st.integers(1, 255))])
            frames[which] = frame[:at] + flipped + frame[at + 1 :]
        elif harm == "cut":
            frames[which] = frame[:at]
        elif harm == "grow":
            frames[which] = frame + draw(st.binary(min_size=1, max_size=9))
        elif harm == "swap":
            other = draw(st.integers(0, len(frames) - 1))
            frames[which], frames[other] = frames[other], frames[which]
        elif harm == "lose":
            del frames[which]
        elif harm == "double":
            frames.insert(which, frame)
        else:
            frames[which] = frame[:at] + draw(st.binary(max_size=9)) + frame[at:]
    return frames
