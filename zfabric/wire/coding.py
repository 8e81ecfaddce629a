"""Each message's body: how it is packed, how it is read, and its number on the wire.

`decode` is total: whatever frames arrive, it returns a message or raises RemoteProtocolError
with a constant reason that the caller counts. It allocates nothing that the received bytes do
not pay for (msgpack refuses declared lengths beyond the buffer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgpack import Packer, unpackb

from zfabric import messages as m
from zfabric.errors import LocalProtocolError, RemoteProtocolError
from zfabric.wire.fields import (
    Malformed,
    pack_ids,
    pack_options,
    read_blobs,
    read_bytes,
    read_dependencies,
    read_functions,
    read_ids,
    read_int,
    read_int_list,
    read_limits,
    read_list,
    read_options,
    read_resources,
    read_row_ids,
    read_seconds,
    read_text,
)
from zfabric.wire.header import MAX_FRAMES, PROTOCOL, Header, decode_header, encode_header

__all__ = ["Body", "Header", "decode", "encode", "encode_body", "encode_header"]

MAX_VALUE = 1 << 46
"""Bytes of the largest value. Sizes are passed on: nobody may bring in one that others refuse."""

LEAST_HELLO = 11
"""Fields of the first Hello there was. Those that were added since may be missing, and further
ones be there: it has to be read across versions."""

Frame = bytes | memoryview
Bulk = tuple[Frame, ...]


class Body(NamedTuple):
    """A message as it will travel, but for the header, which changes when it is sent again."""

    kind: int
    frames: list[Frame]
    nbytes: int
    sequenced: bool


_pack: Callable[[Any], bytes] = Packer().pack
"""One packer for all: making one costs more than packing a row with it. It runs no Python code
while it packs, so threads cannot get in each other's way."""


class _Kind(NamedTuple):
    message: type
    sequenced: bool
    pack: Callable[[Any], Any]
    read: Callable[[list[Any], Bulk], m.Message]
    n_fields: int


def encode_body(message: m.Message) -> Body:
    """Everything behind the header. Raises LocalProtocolError when a field cannot be packed."""
    entry = _PACKERS[type(message)]
    try:
        packed = _pack(entry.pack(message))
    except (TypeError, ValueError, OverflowError) as exc:
        raise LocalProtocolError(f"cannot pack {type(message).__name__}: {exc}") from exc
    if not entry.bulk:
        return Body(entry.number, [packed], len(packed), entry.sequenced)
    frames: list[Frame] = [packed]
    if isinstance(message, (m.Chunk, m.Put)):
        frames.append(message.data)
    elif isinstance(message, m.Relay):
        frames.extend(message.frames)
    return Body(entry.number, frames, sum(map(len, frames)), entry.sequenced)


def encode(
    message: m.Message, token: int = 0, epoch: int = 0, seq: int = 0, ack: int = 0
) -> list[Frame]:
    """The frames of a message: header, body, bulk."""
    body = encode_body(message)
    return [encode_header(body.kind, token, epoch, seq, ack), *body.frames]


def is_sequenced(message: m.Message) -> bool:
    """Whether the message takes a number and is sent again until it is acknowledged."""
    return type(message) in _SEQUENCED


def decode(frames: Sequence[Frame]) -> tuple[Header, m.Message]:
    """The message in these frames. Raises RemoteProtocolError, and nothing else.

    A Hello or Refuse of another protocol version is returned too, with that version in its
    header, so that both sides can say what they speak.
    """
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise RemoteProtocolError("frame-count", f"{len(frames)} frames")
    header = decode_header(bytes(frames[0]))
    kind = _KINDS.get(header.kind)
    if header.version != PROTOCOL and (kind is None or kind.message not in (m.Hello, m.Refuse)):
        raise RemoteProtocolError("version", f"protocol version {header.version}, not {PROTOCOL}")
    if kind is None:
        raise RemoteProtocolError("kind", f"unknown kind of message {header.kind}")
    if (header.seq != 0) is not kind.sequenced:
        raise RemoteProtocolError("sequence", "a sequence number is missing or out of place")
    try:
        fields = unpackb(frames[1])
        if type(fields) is not list or (
            len(fields) != kind.n_fields
            and not (kind.message is m.Hello and len(fields) >= LEAST_HELLO)
        ):
            raise Malformed("not the fields of this kind of message")
        return header, kind.read(fields, tuple(frames[2:]))
    except Malformed as exc:
        raise RemoteProtocolError("body", f"{kind.message.__name__}: {exc}") from None
    except Exception as exc:  # msgpack and UTF-8 raise several unrelated kinds on garbage
        raise RemoteProtocolError("body-garbage", f"{kind.message.__name__}: {exc}") from None


# --- Readers, one per layout ------------------------------------------------------------------


def _no_bulk(bulk: Bulk) -> None:
    if bulk:
        raise Malformed("bulk frames where none belong")


def _one_bulk(bulk: Bulk) -> Frame:
    if len(bulk) != 1:
        raise Malformed("not exactly one bulk frame")
    return bulk[0]


def _read_hello(f: list[Any], bulk: Bulk) -> m.Hello:
    _no_bulk(bulk)
    if f[0] not in (m.CLIENT, m.WORKER) or type(f[8]) is not bool:
        raise Malformed("unknown role or kind of slots")
    return m.Hello(
        f[0],
        read_text(f[1], 256),
        read_text(f[2], 64),
        read_text(f[3], 64),
        read_text(f[4], 256),
        read_int(f[5]),
        read_int(f[6], 0, 1 << 16),
        read_int(f[7], 0, 1 << 16),
        f[8],
        read_resources(f[9]),
        read_text(f[10], 512),
        *_read_hello_again(f[11:]),
    )


def _read_hello_again(f: list[Any]) -> tuple[int, int, str]:
    """What a Hello may leave out. What a later one has beyond these means nothing here."""
    return (
        read_int(f[0]) if f else 0,
        read_int(f[1]) if len(f) > 1 else 0,
        read_text(f[2], 256) if len(f) > 2 else "",
    )


def _read_welcome(f: list[Any], bulk: Bulk) -> m.Welcome:
    _no_bulk(bulk)
    return m.Welcome(
        read_int(f[0], 1),
        read_text(f[1]),
        read_text(f[2]),
        read_int(f[3]),
        read_seconds(f[4]),
        read_seconds(f[5]),
        bool(read_int(f[6], 0, 1)),
        read_int(f[7]),
    )


def _read_refuse(f: list[Any], bulk: Bulk) -> m.Refuse:
    _no_bulk(bulk)
    return m.Refuse(read_text(f[0], 64), read_text(f[1], 16384))


def _read_beat(f: list[Any], bulk: Bulk) -> m.Beat:
    _no_bulk(bulk)
    load = read_int_list(f[1])
    if len(load) > 16:
        raise Malformed("a load of more than 16 figures")
    return m.Beat(read_int(f[0]), tuple(load), read_int(f[2]))


def _read_relay(f: list[Any], bulk: Bulk) -> m.Relay:
    return m.Relay(read_int(f[0], 1), bulk)  # type: ignore[arg-type]


def _read_submit(f: list[Any], bulk: Bulk) -> m.Submit:
    _no_bulk(bulk)
    ids = read_ids(f[1])
    n = len(ids)
    fns = read_ids(f[2])
    if len(fns) != n:
        raise Malformed("a column has another length than its ids")
    return m.Submit(
        read_functions(f[0]),
        ids,
        fns,
        read_blobs(f[3], n),
        read_row_ids(f[4], n),
        read_options(f[5], n),
    )


def _read_register(f: list[Any], bulk: Bulk) -> m.Register:
    _no_bulk(bulk)
    ids, sizes = read_ids(f[0]), read_ids(f[1])
    holders = [read_int_list(h) for h in read_list(f[2])]
    if sizes and max(sizes) > MAX_VALUE:
        raise Malformed("a value larger than any store")
    if not len(ids) == len(sizes) == len(holders):
        raise Malformed("a column has another length than its ids")
    return m.Register(ids, sizes, holders)


def _question_reader(kind: type[Any]) -> Callable[[list[Any], Bulk], m.Message]:
    def read(f: list[Any], bulk: Bulk) -> m.Message:
        _no_bulk(bulk)
        question: m.Message = kind(
            read_int(f[0]), read_text(f[1], 64), read_ids(f[2]), read_text(f[3])
        )
        return question

    return read


def _read_alarm(f: list[Any], bulk: Bulk) -> m.Alarm:
    _no_bulk(bulk)
    return m.Alarm(read_text(f[0]))


def _read_reply(f: list[Any], bulk: Bulk) -> m.Reply:
    _no_bulk(bulk)
    return m.Reply(read_int(f[0]), read_bytes(f[1]))


def _read_admit(f: list[Any], bulk: Bulk) -> m.Admit:
    _no_bulk(bulk)
    keys = f[0]
    if type(keys) is not list or any(type(key) is not bytes or len(key) != 32 for key in keys):
        raise Malformed("a key is 32 bytes")
    return m.Admit(tuple(keys))


def _read_inventory(f: list[Any], bulk: Bulk) -> m.Inventory:
    _no_bulk(bulk)
    ids, attempts, values, sizes = (read_ids(column) for column in f[:4])
    if len(ids) != len(attempts) or len(values) != len(sizes):
        raise Malformed("a column has another length than its ids")
    if sizes and max(sizes) > MAX_VALUE:
        raise Malformed("a value is larger than any can be")
    credit, n_dropped = read_int(f[4]), read_int(f[5])
    if n_dropped > len(ids):
        raise Malformed("more rows were dropped than there are")
    return m.Inventory(ids, attempts, values, sizes, credit, n_dropped)


def _read_explain(f: list[Any], bulk: Bulk) -> m.Explain:
    _no_bulk(bulk)
    return m.Explain(read_int(f[0]), read_ids(f[1]))


def _read_explained(f: list[Any], bulk: Bulk) -> m.Explained:
    _no_bulk(bulk)
    ids = read_ids(f[1])
    codes = [read_text(code, 64) for code in read_list(f[2])]
    texts = [read_text(text) for text in read_list(f[3])]
    if not len(ids) == len(codes) == len(texts):
        raise Malformed("a column has another length than its ids")
    return m.Explained(read_int(f[0]), ids, codes, texts)


def _read_acquire(f: list[Any], bulk: Bulk) -> m.Acquire:
    _no_bulk(bulk)
    return m.Acquire(read_int(f[0]), read_text(f[1]), _read_bool(f[2]))


def _read_locked(f: list[Any], bulk: Bulk) -> m.Locked:
    _no_bulk(bulk)
    return m.Locked(read_int(f[0]), _read_bool(f[1]))


def _read_bool(value: object) -> bool:
    if type(value) is not bool:
        raise Malformed("neither true nor false")
    return value


def _read_answer(f: list[Any], bulk: Bulk) -> m.Answer:
    _no_bulk(bulk)
    return m.Answer(read_int(f[0]), read_bytes(f[1]))


def _read_statuses(value: object, n: int) -> bytes:
    statuses = read_bytes(value)
    if len(statuses) != n or (n and max(statuses) >= m.N_STATUSES):
        raise Malformed("statuses are not one known byte per row")
    return statuses


def _read_results(f: list[Any], bulk: Bulk) -> m.Results:
    _no_bulk(bulk)
    ids = read_ids(f[0])
    n = len(ids)
    return m.Results(ids, _read_statuses(f[1], n), read_blobs(f[2], n))


def _read_give(f: list[Any], bulk: Bulk) -> m.Give:
    _no_bulk(bulk)
    ids = read_ids(f[0])
    return m.Give(ids, read_blobs(f[1], len(ids)))


def _read_run(f: list[Any], bulk: Bulk) -> m.Run:
    _no_bulk(bulk)
    ids, attempts, fns = read_ids(f[1]), read_ids(f[2]), read_ids(f[3])
    n = len(ids)
    if not n == len(attempts) == len(fns):
        raise Malformed("a column has another length than its ids")
    return m.Run(
        read_functions(f[0]),
        ids,
        attempts,
        fns,
        read_blobs(f[4], n),
        read_dependencies(f[5], n),
        read_limits(f[6], n),
    )


def _read_done(f: list[Any], bulk: Bulk) -> m.Done:
    _no_bulk(bulk)
    ids, attempts = read_ids(f[0]), read_ids(f[1])
    n = len(ids)
    if len(attempts) != n:
        raise Malformed("a column has another length than its ids")
    statuses = _read_statuses(f[2], n)
    payloads = read_blobs(f[3], n)
    if m.STORED in statuses:
        for status, payload in zip(statuses, payloads, strict=True):
            if status == m.STORED and (
                len(payload) != 8 or int.from_bytes(payload, "little") > MAX_VALUE
            ):
                raise Malformed("a stored value's size is not 8 bytes, or larger than any store")
    return m.Done(ids, attempts, statuses, payloads, read_int(f[4]))


def _read_returned(f: list[Any], bulk: Bulk) -> m.Returned:
    _no_bulk(bulk)
    ids, attempts = read_ids(f[0]), read_ids(f[1])
    if len(ids) != len(attempts):
        raise Malformed("a column has another length than its ids")
    return m.Returned(ids, attempts, read_int(f[2]))


def _read_output(f: list[Any], bulk: Bulk) -> m.Output:
    _no_bulk(bulk)
    ids = read_ids(f[0])
    attempts, starts = read_ids(f[1]), read_ids(f[2])
    if not len(attempts) == len(starts) == len(ids):
        raise Malformed("a column has another length than its ids")
    return m.Output(ids, attempts, starts, read_blobs(f[3], len(ids)))


def _read_fetch(f: list[Any], bulk: Bulk) -> m.Fetch:
    _no_bulk(bulk)
    codecs = tuple(read_text(name, 32) for name in read_list(f[3]))
    if len(codecs) > 16:
        raise Malformed("more codecs than anybody has")
    return m.Fetch(
        read_int(f[0]),
        read_int(f[1]),
        read_int(f[2]),
        codecs,
        read_int(f[4]),
        read_int(f[5]),
        read_text(f[6]),
    )


def _read_not_here(f: list[Any], bulk: Bulk) -> m.NotHere:
    _no_bulk(bulk)
    others = read_list(f[1])
    if len(others) > 16:
        raise Malformed("more places than anybody needs")
    places = [read_list(other) for other in others]
    if any(len(place) != 2 for place in places):
        raise Malformed("a place is a number and an address")
    return m.NotHere(
        read_int(f[0]), tuple((read_int(number), read_text(text)) for number, text in places)
    )


def _part_reader(message: type[m.Chunk] | type[m.Put]) -> Callable[[list[Any], Bulk], m.Message]:
    def read(f: list[Any], bulk: Bulk) -> m.Message:
        sizes = read_int_list(f[2], 1 << 48)
        if len(sizes) > m.MAX_BUFFERS:
            raise Malformed("a value of too many buffers")
        packing = read_bytes(f[3])
        if len(packing) > 64:
            raise Malformed("a compression header that is too long")
        return message(read_int(f[0]), read_int(f[1], 0, 1 << 48), sizes, _one_bulk(bulk), packing)

    return read


def _read_put_done(f: list[Any], bulk: Bulk) -> m.PutDone:
    _no_bulk(bulk)
    return m.PutDone(read_int(f[0]), read_text(f[1]))


def _read_links_told(f: list[Any], bulk: Bulk) -> m.LinksTold:
    _no_bulk(bulk)
    return m.LinksTold(read_int(f[0]), read_bytes(f[1]))


def _ids_reader(message: Callable[[list[int]], m.Message]) -> Callable[..., m.Message]:
    def read(f: list[Any], bulk: Bulk) -> m.Message:
        _no_bulk(bulk)
        return message(read_ids(f[0]))

    return read


def _pack_question(x: Any) -> tuple[Any, ...]:
    return x.request, x.what, pack_ids(x.about), x.text


def _pack_column(x: Any) -> Any:
    return (pack_ids(x.ids),)


def _pack_part(x: Any) -> Any:
    return (x.id, x.offset, list(x.sizes), x.packing)


def _int_reader(message: Callable[[int], m.Message]) -> Callable[..., m.Message]:
    def read(f: list[Any], bulk: Bulk) -> m.Message:
        _no_bulk(bulk)
        return message(read_int(f[0]))

    return read


def _read_bye(f: list[Any], bulk: Bulk) -> m.Bye:
    _no_bulk(bulk)
    return m.Bye(read_text(f[0]))


def _read_forget(f: list[Any], bulk: Bulk) -> m.Forget:
    _no_bulk(bulk)
    return m.Forget(read_ids(f[0]))


# --- The table: number on the wire -> everything about a kind ---------------------------------
# Numbers are never given to another kind. Below 16: sessions; 16..: sequenced; 48..: data.

_KINDS: dict[int, _Kind] = {
    1: _Kind(
        m.Hello,
        False,
        lambda x: (
            x.role,
            x.name,
            x.zfabric,
            x.python,
            x.host,
            x.pid,
            x.depth,
            x.slots,
            x.threads,
            dict(x.resources),
            x.data_address,
            x.previous,
            x.acked,
            x.run,
        ),
        _read_hello,
        14,
    ),
    2: _Kind(
        m.Welcome,
        False,
        lambda x: (
            x.number,
            x.name,
            x.zfabric,
            x.inline_limit,
            x.beat_s,
            x.dead_s,
            int(x.resumed),
            x.counter,
        ),
        _read_welcome,
        8,
    ),
    3: _Kind(m.Refuse, False, lambda x: (x.code, x.text), _read_refuse, 2),
    4: _Kind(m.Beat, False, lambda x: (x.sent, x.load, x.relayed), _read_beat, 3),
    5: _Kind(m.Nack, False, lambda x: (x.expected,), _int_reader(m.Nack), 1),
    6: _Kind(m.Relay, False, lambda x: (x.peer,), _read_relay, 1),
    16: _Kind(m.Bye, True, lambda x: (x.reason,), _read_bye, 1),
    17: _Kind(
        m.Submit,
        True,
        lambda x: (
            x.functions,
            pack_ids(x.ids),
            pack_ids(x.fns),
            x.payloads,
            x.deps,
            pack_options(x.options),
        ),
        _read_submit,
        6,
    ),
    18: _Kind(m.Release, True, _pack_column, _ids_reader(m.Release), 1),
    19: _Kind(m.Cancel, True, _pack_column, _ids_reader(m.Cancel), 1),
    20: _Kind(m.Retry, True, _pack_column, _ids_reader(m.Retry), 1),
    21: _Kind(
        m.Register,
        True,
        lambda x: (pack_ids(x.ids), pack_ids(x.sizes), x.holders),
        _read_register,
        3,
    ),
    22: _Kind(m.Ask, True, _pack_question, _question_reader(m.Ask), 4),
    23: _Kind(m.Answer, True, lambda x: (x.request, x.payload), _read_answer, 2),
    24: _Kind(
        m.Results,
        True,
        lambda x: (pack_ids(x.ids), x.statuses, x.payloads),
        _read_results,
        3,
    ),
    25: _Kind(
        m.Run,
        True,
        lambda x: (
            x.functions,
            pack_ids(x.ids),
            pack_ids(x.attempts),
            pack_ids(x.fns),
            x.payloads,
            x.deps,
            x.limits,
        ),
        _read_run,
        7,
    ),
    26: _Kind(m.Recall, True, _pack_column, _ids_reader(m.Recall), 1),
    27: _Kind(m.Drop, True, _pack_column, _ids_reader(m.Drop), 1),
    28: _Kind(m.Free, True, _pack_column, _ids_reader(m.Free), 1),
    29: _Kind(m.Forget, True, lambda x: (pack_ids(x.fns),), _read_forget, 1),
    30: _Kind(
        m.Done,
        True,
        lambda x: (pack_ids(x.ids), pack_ids(x.attempts), x.statuses, x.payloads, x.credit),
        _read_done,
        5,
    ),
    31: _Kind(
        m.Returned,
        True,
        lambda x: (pack_ids(x.ids), pack_ids(x.attempts), x.credit),
        _read_returned,
        3,
    ),
    32: _Kind(m.Missing, True, _pack_column, _ids_reader(m.Missing), 1),
    33: _Kind(m.Holds, True, _pack_column, _ids_reader(m.Holds), 1),
    34: _Kind(m.Give, True, lambda x: (pack_ids(x.ids), x.payloads), _read_give, 2),
    48: _Kind(
        m.Fetch,
        False,
        lambda x: (x.id, x.offset, x.length, x.codecs, x.rate, x.number, x.address),
        _read_fetch,
        7,
    ),
    49: _Kind(m.Chunk, False, _pack_part, _part_reader(m.Chunk), 4),
    50: _Kind(m.Put, False, _pack_part, _part_reader(m.Put), 4),
    51: _Kind(m.PutDone, False, lambda x: (x.id, x.error), _read_put_done, 2),
    52: _Kind(m.NotHere, False, lambda x: (x.id, x.others), _read_not_here, 2),
    64: _Kind(m.Acquire, True, lambda x: (x.request, x.name, x.waits), _read_acquire, 3),
    65: _Kind(m.Unlock, True, lambda x: (x.request,), _int_reader(m.Unlock), 1),
    66: _Kind(m.Locked, True, lambda x: (x.request, x.held), _read_locked, 2),
    70: _Kind(
        m.Output,
        True,
        lambda x: (pack_ids(x.ids), pack_ids(x.attempts), pack_ids(x.starts), x.texts),
        _read_output,
        4,
    ),
    76: _Kind(
        m.Inventory,
        True,
        lambda x: (
            pack_ids(x.ids),
            pack_ids(x.attempts),
            pack_ids(x.values),
            pack_ids(x.sizes),
            x.credit,
            x.n_dropped,
        ),
        _read_inventory,
        6,
    ),
    96: _Kind(m.LinksWanted, False, lambda x: (x.request,), _int_reader(m.LinksWanted), 1),
    97: _Kind(m.LinksTold, False, lambda x: (x.request, x.payload), _read_links_told, 2),
    100: _Kind(m.Explain, True, lambda x: (x.ticket, pack_ids(x.ids)), _read_explain, 2),
    101: _Kind(
        m.Explained,
        True,
        lambda x: (x.ticket, pack_ids(x.ids), x.codes, x.texts),
        _read_explained,
        4,
    ),
    110: _Kind(m.Admit, True, lambda x: (x.keys,), _read_admit, 1),
    120: _Kind(m.Alarm, False, lambda x: (x.text,), _read_alarm, 1),
    121: _Kind(m.Query, False, _pack_question, _question_reader(m.Query), 4),
    122: _Kind(m.Reply, False, lambda x: (x.request, x.payload), _read_reply, 2),
}


class _Packing(NamedTuple):
    number: int
    pack: Callable[[Any], Any]
    sequenced: bool
    bulk: bool


_PACKERS = {
    entry.message: _Packing(
        number, entry.pack, entry.sequenced, entry.message in (m.Chunk, m.Put, m.Relay)
    )
    for number, entry in _KINDS.items()
}
_SEQUENCED = frozenset(entry.message for entry in _KINDS.values() if entry.sequenced)
