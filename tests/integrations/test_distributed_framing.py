"""Messages of distributed as transport messages and back; credit. No sockets, no loop."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("distributed")

np = pytest.importorskip("numpy")

from distributed.protocol import Serialize  # noqa: E402

from zfabric.codec import compress  # noqa: E402
from zfabric.integrations.distributed import framing, memory  # noqa: E402
from zfabric.integrations.distributed.flow import GIVE_BACK, LEAST, WINDOW, Flow, weight  # noqa: E402
from zfabric.integrations.distributed.framing import Assembly  # noqa: E402
from zfabric.integrations.distributed.memory import Cell, Neighbour  # noqa: E402
from zfabric.integrations.distributed.small import is_small  # noqa: E402


def host_array(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def through(frames, packer=None):
    messages = [[bytes(part) for part in m] for m in framing.split(frames, packer)]
    assert max(len(part) for m in messages for part in m) <= framing.WHOLE + 64
    (head,), *rest = messages
    assembly = Assembly(head, host_array)
    for tag, *parts in rest:
        assert assembly.missing
        assembly.add(*parts) if tag == framing.RAW else assembly.add_packed(*parts)
    assert not assembly.missing
    return assembly.frames, messages


SIZES = [
    [],
    [0],
    [5],
    [5, 0, 7, 0],
    [100, 300_000],
    [10, 2 * framing.CHUNK, 0, 3 * framing.CHUNK + 1, 17],
    [framing.INLINE, framing.INLINE, 1, framing.CHUNK, 0],
    [9, framing.WHOLE, framing.WHOLE + 1, 5 * framing.CHUNK, 3],
    [70_000] * 40,
    [3] * 5000,
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_frames_arrive_as_they_were_in_writable_memory(sizes) -> None:
    rng = random.Random(1)
    frames = [
        rng.randbytes(n) if i % 2 else memoryview(rng.randbytes(n)) for i, n in enumerate(sizes)
    ]
    got, _ = through(frames)
    assert [bytes(f) for f in got] == [bytes(f) for f in frames]
    assert not any(f.readonly for f in got if len(f))


def test_only_the_bytes_in_front_share_memory() -> None:
    frames = [b"msgpack", b"pickle", memoryview(b"a" * 100), memoryview(b"b" * 100), b"late"]
    got, _ = through(frames)
    owners = [id(f.obj) for f in got]
    assert owners[0] == owners[1]
    assert len(set(owners)) == 4


def test_compressed_chunks_land_in_their_place() -> None:
    frames = [b"head", memoryview(bytes(3 * framing.CHUNK + 1000)), memoryview(b"x" * 400_000)]
    got, messages = through(frames, lambda chunk: compress.compress(chunk, 8))
    assert [bytes(f) for f in got] == [bytes(f) for f in frames]
    assert {m[0] for m in messages[1:]} == {framing.PACKED, framing.RAW}
    assert sum(len(m[-1]) for m in messages) < 100_000


def test_a_received_chunk_that_is_a_whole_frame_is_not_copied() -> None:
    head = framing.head_of([memoryview(bytes(300_000))])
    assembly = Assembly(head, host_array)
    chunk = memoryview(bytearray(300_000)).toreadonly()
    assembly.add(chunk)
    assembly.frames[0][7] = 9
    assert chunk[7] == 9


def test_frames_of_any_shape_are_flat_bytes() -> None:
    x = np.arange(12.0).reshape(3, 4)
    for array in (x, x.T, x[:, ::2], x[:0], x.reshape(2, 3, 2), np.empty((4, 0))):
        view = framing.flat(array.data)
        assert len(view) == array.nbytes
        assert sorted(bytes(view)) == sorted(array.tobytes())


@pytest.mark.parametrize("head", [b"", b"D\0\0\0", b"D\0\0\0\2\0\0\0" + b"\1" * 8, b"Q" * 16])
def test_a_head_that_makes_no_sense_is_refused(head) -> None:
    with pytest.raises(ValueError):
        Assembly(head, host_array)


def test_more_than_was_announced_is_refused() -> None:
    assembly = Assembly(framing.head_of([bytes(10)]), host_array)
    with pytest.raises(ValueError):
        assembly.add(bytes(11))


def test_credit_comes_back_before_it_runs_out_for_good() -> None:
    ours, theirs = Flow(), Flow()
    for size in (1, 70_000, framing.CHUNK) * 400:
        assert ours.credit > 0
        ours.spend(size, 0.0)
        back = theirs.eat(weight(size))
        if back:
            ours.refund(back, 1.0)
    assert WINDOW - GIVE_BACK - framing.CHUNK < ours.credit <= WINDOW


def test_credit_bounds_small_messages_too() -> None:
    flow = Flow()
    sent = 0
    while flow.credit > 0:
        flow.spend(1, 0.0)
        sent += 1
    assert sent == WINDOW // LEAST < 4096


def test_credit_for_what_was_never_sent_is_refused() -> None:
    with pytest.raises(ValueError):
        Flow().refund(1, 0.0)


def test_the_rate_is_that_of_the_link_while_it_was_busy() -> None:
    flow = Flow()
    flow.spend(GIVE_BACK, 10.0)
    flow.refund(GIVE_BACK, 11.0)
    assert flow.rate == GIVE_BACK
    flow.spend(GIVE_BACK, 20.0)  # nine idle seconds do not count
    flow.refund(GIVE_BACK, 21.0)
    assert flow.rate == pytest.approx(GIVE_BACK)


def test_a_part_is_put_where_it_belongs(monkeypatch) -> None:
    frames = [b"msgpack", memoryview(bytes(range(256)) * 2000), b"end"]
    monkeypatch.setattr(framing, "PIECE", 300_000)
    head, *rest = framing.split(frames, fetched=True)
    held = [message for message in rest if type(message) is framing.Held]
    assert [message.nbytes for message in held] == [300_000, 212_000]
    assembly = Assembly(head[0], host_array)
    neighbour = Neighbour(Cell().offer)
    for message in rest:
        if message in held:
            address, nbytes = framing.SPAN.unpack(message.words[1])
            neighbour.fetch(address, assembly.room(nbytes))
        else:
            assembly.add(message[1])
    assert [bytes(frame) for frame in assembly.frames] == [bytes(frame) for frame in frames]


def test_a_message_in_one_names_its_large_frames_and_holds_the_small_ones() -> None:
    big = memoryview(bytes(400_000))
    frames = [b"msgpack", b"", big, b"ab", b"c", memoryview(b"d" * framing.FETCH), b"end"]
    (held,) = framing.split(frames, fetched=True)
    head, spans, joined = held.words
    assert joined == b"msgpackabcend"
    assert [n for _, n in framing.spans_of(spans)] == [7, 400_000, 3, framing.FETCH, 3]
    assert [bool(address) for address, _ in framing.spans_of(spans)] == [0, 1, 0, 1, 0]
    assert held.pieces == [frames[2], frames[5]]
    assert held.nbytes == Assembly(head, host_array).missing == sum(map(len, frames))


def test_a_part_larger_than_its_frame_is_refused() -> None:
    assembly = Assembly(framing.head_of([memoryview(bytes(10)), bytes(10)]), host_array)
    with pytest.raises(ValueError):
        assembly.room(11)
    assembly.room(10)
    assembly.room(10)
    with pytest.raises(ValueError):
        assembly.room(1)


def test_who_wiped_its_cell_is_not_believed() -> None:
    cell = Cell()
    neighbour = Neighbour(cell.offer)
    data = memoryview(bytearray(b"x" * 100))
    place = memoryview(bytearray(100))
    neighbour.fetch(memory.address_of(data), place)
    assert place == data
    cell.wipe()
    with pytest.raises(OSError, match="has dropped what it offered"):
        neighbour.fetch(memory.address_of(data), place)
    Neighbour(Cell().offer)


def test_a_process_whose_memory_proves_unreadable_gets_chunks_from_then_on(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_mute", set())
    cell = Cell()
    with pytest.raises(OSError):
        Neighbour(cell.offer).fetch(4096, memoryview(bytearray(100)))  # nothing is mapped there
    with pytest.raises(OSError):
        Neighbour(cell.offer)


@pytest.mark.parametrize("offer", [b"", b"-", bytes(32), b"\xff" * 32])
def test_an_offer_that_cannot_be_read_is_refused(offer) -> None:
    with pytest.raises(OSError):
        Neighbour(offer)


def test_a_cell_of_another_word_is_refused() -> None:
    with pytest.raises(OSError):
        Neighbour(Cell().offer[:-16] + bytes(16))


@pytest.mark.parametrize(
    ("message", "small"),
    [
        ({"op": "ping", "n": [1, 2.0, None, True, ("x", b"y", {})]}, True),
        ([{"op": "x"}] * 600, True),
        ([{"op": "x"}] * 700, False),
        ({"x": bytes(2_000_000)}, False),
        ({"x": object()}, False),
        ({1, 2}, False),
        ({"x": Serialize(np.zeros(1000)), "n": 1}, True),
        ({"x": Serialize(np.zeros(200_000))}, False),
        ({"x": Serialize(np.array([object()]))}, False),
        ({"x": Serialize(sum)}, False),
    ],
    ids=range(10),
)
def test_a_few_plain_things_and_small_arrays_are_small(message, small) -> None:
    assert is_small(message) is small


def test_the_head_of_a_message_tells_of_pieces_that_were_fetched() -> None:
    for n in (0, 1, 70_000, framing.MOST_TOLD):
        for frames in ([b"all in one"], [memoryview(bytes(400_000))]):
            asked: list[int] = []
            messages = framing.split(frames, told=lambda n=n, asked=asked: asked.append(n) or n)
            assert not asked  # what is fetched until it leaves counts as well
            head, *rest = messages
            assert asked == [n] and framing.n_fetched(head[0]) == n
            assembly = Assembly(head[0], host_array)
            for _, chunk in rest:
                assembly.add(chunk)
            assert [bytes(frame) for frame in assembly.frames] == [bytes(frames[0])]
