"""`zmq://` comms in one process: the behaviour that distributed asks of every backend.

After distributed/comm/tests/test_comms.py of distributed, whose checks take an address but are
not shipped with it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from time import monotonic

import pytest

distributed = pytest.importorskip("distributed")
np = pytest.importorskip("numpy")
dask = pytest.importorskip("dask")

from distributed.comm import CommClosedError, connect, listen, parse_address  # noqa: E402
from distributed.comm.addressing import (  # noqa: E402
    get_address_host,
    get_local_address_for,
    parse_host_port,
    resolve_address,
)
from distributed.comm.registry import backends  # noqa: E402
from distributed.protocol import Serialized, deserialize, serialize, to_serialize  # noqa: E402
from distributed.utils import get_ip  # noqa: E402

import zfabric.distributed  # noqa: E402
from zfabric.integrations.distributed import memory  # noqa: E402
from zfabric.integrations.distributed.flow import WINDOW  # noqa: E402
from zfabric.integrations.distributed.framing import head_of  # noqa: E402
from zfabric.transport import zmq_socket  # noqa: E402

IP = get_ip()


@pytest.fixture(autouse=True)
def no_socket_is_left(wait_until):
    yield
    gc.collect()
    wait_until(lambda: not len(zmq_socket.live), what="sockets closed")


def run(coroutine_function):
    """The test as a plain function, in a loop of its own, with a time limit."""

    def test(*args, **kwargs):
        asyncio.run(asyncio.wait_for(coroutine_function(*args, **kwargs), 30))

    test.__name__ = coroutine_function.__name__
    test.__doc__ = coroutine_function.__doc__
    import inspect

    test.__signature__ = inspect.signature(coroutine_function)
    return test


async def comm_pair(address="zmq://127.0.0.1", **kwargs):
    accepted = asyncio.Queue()
    async with listen(address, accepted.put, **kwargs) as listener:
        comm = await connect(listener.contact_address, **kwargs)
        return comm, await accepted.get()


async def until(condition):
    """Let the loop run until it holds; the test's own time limit ends what never does."""
    while not condition():
        await asyncio.sleep(0.001)


async def close(*comms):
    for comm in comms:
        await comm.close()


def test_distributed_finds_the_backend() -> None:
    assert isinstance(backends["zmq"], zfabric.distributed.ZmqBackend)


def test_addresses_are_taken_apart() -> None:
    assert get_address_host("zmq://127.0.0.1:123") == "127.0.0.1"
    assert resolve_address("zmq://localhost:456") == "zmq://127.0.0.1:456"
    assert resolve_address("zmq://[::1]:123") == "zmq://[::1]:123"
    assert get_local_address_for("zmq://127.0.0.1:80") == "zmq://127.0.0.1"


async def check_client_server(address, host, contact=None):
    async def handle(comm):
        assert parse_address(comm.peer_address)[0] == "zmq"
        msg = await comm.read()
        assert msg["op"] == "ping"
        msg["op"] = "pong"
        await comm.write(msg)
        assert (await comm.read())["op"] == "foobar"
        await comm.close()

    listener = await listen(address, handle, xxx="bar")
    bound_host, port = parse_host_port(parse_address(listener.listen_address)[1])
    assert bound_host == host and 1023 < port < 65536
    assert parse_host_port(parse_address(listener.contact_address)[1]) == (contact or host, port)
    got = set()

    async def talk(number):
        comm = await connect(listener.contact_address, xxx="foo")
        assert comm.peer_address == listener.contact_address
        await comm.write({"op": "ping", "data": number})
        await comm.write({"op": "foobar"})
        assert await comm.read() == {"op": "pong", "data": number}
        got.add(number)
        await comm.close()

    await talk(1234)
    await asyncio.gather(*map(talk, range(20)))
    assert got == {1234, *range(20)}
    listener.stop()


@pytest.mark.parametrize(
    ("address", "host", "contact"),
    [
        ("zmq://127.0.0.1", "127.0.0.1", None),
        ("zmq://localhost", "127.0.0.1", None),
        ("zmq://0.0.0.0", "0.0.0.0", IP),
        ("zmq://", "0.0.0.0", IP),
    ],
)
@run
async def test_client_and_server(address, host, contact) -> None:
    await check_client_server(address, host, contact)


def has_ipv6() -> bool:
    import socket

    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
@run
async def test_client_and_server_by_ipv6() -> None:
    await check_client_server("zmq://[::1]", "::1")


@run
async def test_a_port_is_taken_once_and_free_afterwards(free_port) -> None:
    async def handle(comm):
        await comm.close()

    address = f"zmq://127.0.0.1:{free_port}"
    for _ in range(3):
        async with listen(address, handle):
            with pytest.raises(OSError) as caught:
                await listen(address, handle)
            assert caught.value.errno == 98  # EADDRINUSE: workers then try the next port


@run
async def test_closing_at_the_other_end_ends_reads() -> None:
    async def handle(comm):
        await comm.close()

    async with listen("zmq://127.0.0.1", handle) as listener:
        comm = await connect(listener.contact_address)
        with pytest.raises(CommClosedError):
            await comm.write({})
            await comm.read()
        other = await connect(listener.contact_address)
        with pytest.raises(CommClosedError):
            await other.read()


@run
async def test_after_close_nothing_works_at_either_end() -> None:
    a, b = await comm_pair()
    reads = [asyncio.ensure_future(comm.read()) for comm in (a, b)]
    await asyncio.sleep(0)
    await a.close()
    for read in reads:
        with pytest.raises(CommClosedError):
            await read
    for comm in (a, b):
        assert comm.closed()
        with pytest.raises(CommClosedError):
            await comm.read()
        with pytest.raises(CommClosedError):
            await comm.write({})
    await close(b, a, b)


@run
async def test_the_answer_to_a_peer_that_died_leaves_the_news_to_who_reads_next() -> None:
    """distributed's scheduler forgets a worker only by reading, after its answer."""
    a, b = await comm_pair()
    await a.write("register")
    a.abort()
    assert await b.read() == "register"
    await until(b.closed)
    await b.write("registered")
    with pytest.raises(CommClosedError):
        await b.read()
    with pytest.raises(CommClosedError):
        await b.write("more")

    a, b = await comm_pair()
    a.abort()
    await until(b.closed)
    await b.write("dropped")
    with pytest.raises(CommClosedError):  # also who never reads hears of it
        await b.write("more")
    await close(a, b)


@run
async def test_what_was_written_before_close_arrives() -> None:
    a, b = await comm_pair()
    data = np.arange(2_000_000)
    await a.write({"x": to_serialize(data)})
    await a.write("last")
    await a.close()
    assert ((await b.read())["x"] == data).all()
    assert await b.read() == "last"
    with pytest.raises(CommClosedError):
        await b.read()


@run
async def test_who_gives_up_reading_has_closed() -> None:
    a, b = await comm_pair()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(a.read(), 0.01)
    assert a.closed()
    with pytest.raises(CommClosedError):
        await b.read()


@run
async def test_a_comm_may_be_aborted_from_another_thread() -> None:
    a, b = await comm_pair()
    thread = threading.Thread(target=a.abort)
    thread.start()
    with pytest.raises(CommClosedError):
        await b.read()
    thread.join()
    assert a.closed()


def test_a_comm_that_outlives_its_loop_is_closed_all_the_same() -> None:
    a, b = asyncio.run(comm_pair())
    a.abort()
    b.abort()
    assert a.closed() and b.closed()


@run
async def test_a_forgotten_comm_is_closed_with_a_warning(caplog) -> None:
    a, b = await comm_pair()
    del a
    gc.collect()
    assert "dangling" in caplog.text
    with pytest.raises(CommClosedError):
        await b.read()


@run
async def test_nobody_there_is_an_error_in_time(free_port) -> None:
    begun = monotonic()
    with pytest.raises(OSError):
        await connect(f"zmq://127.0.0.1:{free_port}", timeout=0.15)
    assert 0.1 <= monotonic() - begun < 3


@run
async def test_a_listener_that_stopped_accepts_nobody_but_keeps_its_comms() -> None:
    accepted = asyncio.Queue()
    listener = await listen("zmq://127.0.0.1", accepted.put)
    a = await connect(listener.contact_address)
    b = await accepted.get()
    listener.stop()
    with pytest.raises(OSError):
        await connect(listener.contact_address, timeout=2)
    await a.write("still")
    assert await b.read() == "still"
    await close(a, b)
    with pytest.raises(OSError):  # now the port is free, too
        await connect(listener.contact_address, timeout=0.1)


@pytest.mark.parametrize("address", ["zmq://127.0.0.1", "zmq://0.0.0.0", "zmq://"])
@run
async def test_many_listeners(address) -> None:
    async def handle(comm):
        pass

    listeners = [await listen(address, handle) for _ in range(100)]
    assert len({listener.listen_address for listener in listeners}) == 100
    assert len({listener.contact_address for listener in listeners}) == 100
    for listener in listeners:
        listener.stop()


def message(data):
    return {
        "op": "update",
        "x": data,
        "to_ser": [to_serialize(data)],
        "ser": Serialized(*serialize(data)),
    }


def plain(value):
    if isinstance(value, Serialized):
        return deserialize(value.header, value.frames)
    return value.data if isinstance(value, to_serialize) else value


@pytest.mark.parametrize("data", [b"abc", os.urandom(1 << 20) * 4], ids=["small", "large"])
@pytest.mark.parametrize("wanted", [True, False])
@run
async def test_deserialize_is_as_asked_for_at_both_ends(data, wanted) -> None:
    a, b = await comm_pair("zmq://", deserialize=wanted)
    sent = message(data)
    for writer, reader in ((a, b), (b, a)):
        await writer.write(sent)
        sent = await reader.read()
        (to_ser,) = sent["to_ser"]
        for value in (to_ser, sent["ser"]):
            assert isinstance(value, Serialized) is not wanted
            assert bytes(plain(value)) == data
        assert sent["op"] == "update" and sent["x"] == data
        sent = sent if not wanted else message(data)
    await close(a, b)


def _raise_eoferror():
    raise EOFError


class EofRaising:
    def __reduce__(self):
        return _raise_eoferror, ()


@run
async def test_an_eoferror_when_deserializing_closes() -> None:
    a, b = await comm_pair()
    await b.write({"data": to_serialize(EofRaising())})
    with pytest.raises(CommClosedError):
        await a.read()
    with pytest.raises(CommClosedError):
        await b.read()


@run
async def test_repr_and_addresses_name_both_ends() -> None:
    a, b = await comm_pair("zmq://")
    assert a.peer_address == b.local_address
    assert a.local_address == b.peer_address
    assert a.local_address in repr(b) and b.local_address in repr(a)
    assert "closed" not in repr(a) + repr(b)
    await close(a, b)
    assert "closed" in repr(a) and "closed" in repr(b)


@run
async def test_each_comm_has_its_own_peer_address() -> None:
    accepted = asyncio.Queue()
    async with listen("zmq://127.0.0.1", accepted.put) as listener:
        ours = [await connect(listener.contact_address) for _ in range(5)]
        theirs = [await accepted.get() for _ in range(5)]
    assert len({comm.peer_address for comm in theirs}) == 5
    assert {c.peer_address for c in theirs} == {c.local_address for c in ours}
    await close(*ours, *theirs)


@pytest.mark.parametrize("shape", [(3,), (100_000,), (1000, 1000), (0, 5)], ids=str)
@run
async def test_arrays_arrive_writable(shape) -> None:
    a, b = await comm_pair()
    x = np.arange(np.prod(shape), dtype=float).reshape(shape)
    await a.write({"x": to_serialize(x), "y": to_serialize([x, x + 1])})
    got = await b.read()
    for have, want in ((got["x"], x), (got["y"][0], x), (got["y"][1], x + 1)):
        assert (have == want).all()
        assert have.flags.writeable and have.flags.aligned
        have += 1
    await close(a, b)


@run
async def test_who_does_not_read_holds_up_its_writer_alone() -> None:
    accepted = asyncio.Queue()
    async with listen("zmq://127.0.0.1", accepted.put) as listener:
        slow, quick = [await connect(listener.contact_address) for _ in range(2)]
        pairs = {c.peer_address: c for c in (await accepted.get(), await accepted.get())}
    x = np.zeros(WINDOW // 4 // 8)
    writes = [asyncio.ensure_future(slow.write({"x": to_serialize(x)})) for _ in range(12)]
    for number in range(200):
        await quick.write(number)
        assert await pairs[quick.local_address].read() == number
    assert sum(write.done() for write in writes) <= 5
    held = pairs[slow.local_address]
    for _ in writes:
        assert (await held.read())["x"].shape == x.shape
    await asyncio.gather(*writes)
    await close(slow, quick, *pairs.values())


@run
async def test_the_sampler_compresses_between_hosts(monkeypatch) -> None:
    a, b = await comm_pair()
    monkeypatch.setattr(type(a), "same_host", property(lambda self: False))
    monkeypatch.setattr(b._link, "fetched", False)
    monkeypatch.setattr(b._link.flow, "rate", 1e8)
    sizes = []
    arrived = a._link.arrived
    monkeypatch.setattr(
        a._link, "arrived", lambda m: (sizes.append(sum(map(len, m))), arrived(m))[1]
    )
    x = np.arange(1_000_000)
    noise = np.frombuffer(os.urandom(1_600_000))
    await b.write({"x": to_serialize(x), "noise": to_serialize(noise)})
    got = await a.read()
    assert (got["x"] == x).all() and got["noise"].tobytes() == noise.tobytes()
    assert got["x"].flags.writeable
    assert noise.nbytes < sum(sizes) < noise.nbytes + x.nbytes // 2
    await close(a, b)


def test_encryption_is_refused_by_name() -> None:
    async def ask():
        with pytest.raises(RuntimeError, match="zmq:// has no TLS"):
            listen("zmq://127.0.0.1", None, require_encryption=True)
        with pytest.raises(RuntimeError, match="zmq:// has no TLS"):
            await connect("zmq://127.0.0.1:1", require_encryption=True)

    asyncio.run(ask())


PEER = """
import asyncio, sys
import zfabric.distributed
from distributed.comm import connect
async def main():
    comm = await connect(sys.argv[1])
    await comm.write("here")
    await comm.read()
asyncio.run(main())
"""


@run
async def test_a_peer_that_is_killed_is_noticed_at_once() -> None:
    accepted = asyncio.Queue()
    async with listen("zmq://127.0.0.1", accepted.put) as listener:
        peer = subprocess.Popen([sys.executable, "-c", PEER, listener.contact_address])
        try:
            comm = await accepted.get()
            assert await comm.read() == "here"
            peer.send_signal(signal.SIGKILL)
            begun = monotonic()
            with pytest.raises(CommClosedError):
                await comm.read()
            assert monotonic() - begun < 5
        finally:
            peer.kill()
            peer.wait()


@run
async def test_a_stranger_at_the_port_disturbs_nobody() -> None:
    accepted = asyncio.Queue()
    async with listen("zmq://127.0.0.1", accepted.put) as listener:
        host, port = parse_host_port(parse_address(listener.contact_address)[1])
        for word in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" + bytes(100), os.urandom(200)):
            _, writer = await asyncio.open_connection(host, port)
            writer.write(word)
            await writer.drain()
            writer.close()
        a = await connect(listener.contact_address)
        b = await accepted.get()
        await a.write(1)
        assert await b.read() == 1
        await close(a, b)


@pytest.mark.parametrize("fetch", [True, False])
@run
async def test_neighbours_fetch_large_frames_from_memory_unless_told_not_to(fetch) -> None:
    with dask.config.set({"distributed.comm.zmq.memory": fetch}):
        a, b = await comm_pair()
        x = np.arange(5_000_000)  # several chunks, more than one piece
        for writer, reader in ((a, b), (b, a), (a, b)):
            await writer.write({"x": to_serialize(x), "n": 1})
            got = await reader.read()
            assert (got["x"] == x).all() and got["x"].flags.writeable and got["n"] == 1
        assert a._link.fetched is b._link.fetched is fetch
        await until(lambda: not a._link._held)
        await close(a, b)


@pytest.mark.parametrize("nbytes", [1, 40_000, 300_000, 3_000_000])
@run
async def test_what_was_fetched_is_let_go_though_nobody_speaks_any_more(nbytes) -> None:
    a, b = await comm_pair()
    for writer, reader in ((a, b), (b, a)):  # by now each knows that it can read the other
        await writer.write(1)
        assert await reader.read() == 1
    arrays = [np.full(nbytes, n, np.uint8) for n in range(10)]
    await a.write({"x": [to_serialize(x) for x in arrays], "n": 1})
    got = await b.read()
    assert all((x == y).all() and y.flags.writeable for x, y in zip(arrays, got["x"], strict=True))
    await until(lambda: not a._link._held)
    await close(a, b)


@run
async def test_an_answer_tells_that_a_piece_was_fetched() -> None:
    a, b = await comm_pair()
    for writer, reader in ((a, b), (b, a)):
        await writer.write(1)
        assert await reader.read() == 1
    words: list[tuple[bytes, ...]] = []
    b._link.say = lambda *word: words.append(word)
    await a.write({"x": to_serialize(np.arange(100_000))})
    await b.read()
    link = b._link
    link._calm()  # however late the answer is here
    await b.write("ok")
    assert await a.read() == "ok"
    assert not a._link._held and not words and not link._unreported
    await close(a, b)


@pytest.mark.parametrize(
    ("spans", "joined"),
    [(b"", b""), (bytes(16), b""), (b"\0" * 8 + b"\4" + b"\0" * 7, b"more"), (b"odd", b"abc")],
    ids=range(4),
)
@run
async def test_a_message_in_one_that_makes_no_sense_ends_the_comm(spans, joined) -> None:
    a, b = await comm_pair()
    for writer, reader in ((a, b), (b, a)):
        await writer.write(1)
        assert await reader.read() == 1
    a._link._send((head_of([b"abc"]), spans, joined))
    with pytest.raises(CommClosedError):
        await b.read()
    assert b.closed()
    await close(a, b)


@run
async def test_where_the_kernel_refuses_large_frames_go_by_zeromq(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_readv", lambda *_: -1)
    a, b = await comm_pair()
    x = np.arange(1_000_000)
    for writer, reader in ((a, b), (b, a), (a, b)):
        await writer.write({"x": to_serialize(x)})
        assert ((await reader.read())["x"] == x).all()
    assert not a._link.fetched and not b._link.fetched
    await close(a, b)


@run
async def test_who_closes_keeps_its_memory_until_the_peer_has_fetched_it() -> None:
    a, b = await comm_pair()
    await a.write(1)
    assert await b.read() == 1
    await b.write(2)
    assert await a.read() == 2
    x = np.full(6_000_000, 7)
    await a.write({"x": to_serialize(x)})
    assert a._link._held
    await a.close()
    assert not a._link._held
    x[:] = 0
    assert (await b.read())["x"].min() == 7
    with pytest.raises(CommClosedError):
        await b.read()


@run
async def test_who_aborts_after_writing_delivers_what_was_meant_or_nothing() -> None:
    a, b = await comm_pair()
    await a.write(1)
    assert await b.read() == 1
    await b.write(2)
    assert await a.read() == 2  # by now each knows whether it can read the other
    x = np.full(2_000_000, 7)
    await a.write({"x": to_serialize(x)})
    a.abort()
    x[:] = 0
    try:
        assert (await b.read())["x"].min() == 7
    except CommClosedError:
        assert b.closed()
    await close(b)


@run
async def test_a_message_larger_than_all_credit_arrives() -> None:
    a, b = await comm_pair()
    x = np.arange(WINDOW // 4)
    for fetched in (a._link.fetched, False):
        a._link.fetched = fetched
        write = asyncio.ensure_future(a.write({"x": to_serialize(x)}))
        assert ((await b.read())["x"] == x).all()
        await write
    assert a._link.flow.credit > 0
    await close(a, b)
