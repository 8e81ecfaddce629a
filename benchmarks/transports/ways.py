"""Each way to move messages between two processes, behind the same few methods.

`send` and `recv` are coroutines, so that asyncio and Tornado run as they are meant to; the
blocking ways never suspend, and `Way.run` drives them without a loop, for a tenth of a
microsecond per call. A received message lies in memory of its own.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import socket
import struct
import tempfile
import uuid
from collections import deque
from collections.abc import Coroutine
from typing import Any

LENGTH = struct.Struct("<Q")
CHUNK = 2 * 2**20
SEGMENT = 2**30


class Way:
    """One end. The one that listens calls listen, then accept; the other one connect."""

    needs = ""
    """A module without which this way is left out."""
    in_threads = False
    """Both ends are threads of one process."""

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            work.send(None)
        except StopIteration as end:
            return end.value
        raise RuntimeError("a blocking way suspended")

    async def listen(self) -> str:
        raise NotImplementedError

    async def accept(self) -> None:
        pass

    async def connect(self, address: str) -> None:
        raise NotImplementedError

    async def send(self, data: Any) -> None:
        raise NotImplementedError

    async def recv(self) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        pass


class Zmq(Way):
    """PAIR sockets, one frame per message; large ones are not copied by us."""

    scheme = "tcp"

    def __init__(self) -> None:
        import zmq

        self.context = zmq.Context.instance()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.linger = 0

    async def listen(self) -> str:
        where = {
            "tcp": "tcp://127.0.0.1:*",
            "ipc": f"ipc://{tempfile.gettempdir()}/{uuid.uuid4().hex[:12]}",
            "inproc": f"inproc://{uuid.uuid4().hex}",
        }[self.scheme]
        self.socket.bind(where)
        address: str = self.socket.last_endpoint.decode()
        return address

    async def connect(self, address: str) -> None:
        self.socket.connect(address)

    async def send(self, data: Any) -> None:
        self.socket.send(data, copy=len(data) < 65536)

    async def recv(self) -> Any:
        return self.socket.recv(copy=False).buffer

    async def close(self) -> None:
        address = self.socket.last_endpoint.decode()
        self.socket.close()
        if address.startswith("ipc://") and os.path.exists(address[6:]):
            os.unlink(address[6:])


class ZmqIpc(Zmq):
    scheme = "ipc"


class ZmqInproc(Zmq):
    scheme = "inproc"
    in_threads = True


class ZmqChunks(Zmq):
    """tcp in parts of 2 MiB that land in one preallocated place: what zfabric does."""

    def __init__(self) -> None:
        super().__init__()
        self._place = memoryview(bytearray(0))

    async def send(self, data: Any) -> None:
        view = memoryview(data)
        send = self.socket.send
        send(LENGTH.pack(len(view)))
        for at in range(0, len(view), CHUNK):
            part = view[at : at + CHUNK]
            send(part, copy=len(part) < 65536)

    async def recv(self) -> Any:
        nbytes = LENGTH.unpack(self.socket.recv())[0]
        place = memoryview(bytearray(nbytes))
        at = 0
        while at < nbytes:
            at += self.socket.recv_into(place[at:])
        return place


class PlainSocket(Way):
    """A blocking TCP socket: length, bytes."""

    def __init__(self) -> None:
        self.listener = self.socket = socket.socket()

    async def listen(self) -> str:
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(1)
        return str(self.listener.getsockname()[1])

    async def accept(self) -> None:
        self.socket = self.listener.accept()[0]
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def connect(self, address: str) -> None:
        self.socket.connect(("127.0.0.1", int(address)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def send(self, data: Any) -> None:
        if len(data) < 65536:
            self.socket.sendall(LENGTH.pack(len(data)) + data)
        else:
            self.socket.sendall(LENGTH.pack(len(data)))
            self.socket.sendall(data)

    def _exactly(self, nbytes: int) -> memoryview:
        place = memoryview(bytearray(nbytes))
        at = 0
        while at < nbytes:
            count = self.socket.recv_into(place[at:])
            if not count:
                raise EOFError
            at += count
        return place

    async def recv(self) -> Any:
        return self._exactly(LENGTH.unpack(self._exactly(8))[0])

    async def close(self) -> None:
        self.socket.close()
        self.listener.close()


class AsyncioStreams(Way):
    """asyncio.open_connection and start_server."""

    def __init__(self) -> None:
        import asyncio

        self.loop = asyncio.new_event_loop()
        self.came: Any = None
        self.servers: list[Any] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def listen(self) -> str:
        import asyncio

        self.came = asyncio.Event()
        server = await asyncio.start_server(self._joined, "127.0.0.1", 0, limit=2**20)
        self.servers.append(server)
        return str(server.sockets[0].getsockname()[1])

    async def _joined(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer = reader, writer
        self.came.set()

    async def accept(self) -> None:
        await self.came.wait()

    async def connect(self, address: str) -> None:
        import asyncio

        streams = await asyncio.open_connection("127.0.0.1", int(address), limit=2**20)
        self.reader, self.writer = streams

    async def send(self, data: Any) -> None:
        self.writer.write(LENGTH.pack(len(data)))
        self.writer.write(data)
        await self.writer.drain()

    async def recv(self) -> Any:
        nbytes = LENGTH.unpack(await self.reader.readexactly(8))[0]
        return await self.reader.readexactly(nbytes)

    async def close(self) -> None:
        self.writer.close()
        for server in self.servers:
            server.close()


class Tornado(AsyncioStreams):
    """tornado.iostream.IOStream, which dask.distributed builds on."""

    needs = "tornado"

    async def listen(self) -> str:
        import asyncio

        from tornado.netutil import bind_sockets
        from tornado.tcpserver import TCPServer

        self.came = asyncio.Event()
        way = self

        class Server(TCPServer):
            async def handle_stream(self, stream: Any, address: Any) -> None:
                way._set(stream)
                way.came.set()

        self.server = Server(max_buffer_size=2**40)
        sockets = bind_sockets(0, "127.0.0.1")
        self.server.add_sockets(sockets)
        return str(sockets[0].getsockname()[1])

    def _set(self, stream: Any) -> None:
        stream.set_nodelay(True)
        self.stream = stream

    async def connect(self, address: str) -> None:
        from tornado.tcpclient import TCPClient

        client = TCPClient()
        self._set(await client.connect("127.0.0.1", int(address), max_buffer_size=2**40))

    async def send(self, data: Any) -> None:
        self.stream.write(LENGTH.pack(len(data)))
        await self.stream.write(data)

    async def recv(self) -> Any:
        nbytes = LENGTH.unpack(await self.stream.read_bytes(8))[0]
        place = bytearray(nbytes)
        await self.stream.read_into(place)
        return place

    async def close(self) -> None:
        self.stream.close()


class Pipe(Way):
    """multiprocessing.connection.Connection over a Unix socket, as multiprocessing.Pipe gives."""

    async def listen(self) -> str:
        from multiprocessing.connection import Listener

        self.listener = Listener(family="AF_UNIX")
        return str(self.listener.address)

    async def accept(self) -> None:
        self.connection: Any = self.listener.accept()
        self.listener.close()

    async def connect(self, address: str) -> None:
        from multiprocessing.connection import Client

        self.connection = Client(address, family="AF_UNIX")

    async def send(self, data: Any) -> None:
        self.connection.send_bytes(data)

    async def recv(self) -> Any:
        return self.connection.recv_bytes()

    async def close(self) -> None:
        self.connection.close()


class SharedMemory(PlainSocket):
    """Written into one of two warm memfd segments, told over a Unix socket, read in place.

    A received message is a view, valid until the next recv.
    """

    def __init__(self) -> None:
        self.listener = self.socket = socket.socket(socket.AF_UNIX)
        self._ours: list[mmap.mmap] = []
        self._theirs: list[mmap.mmap] = []
        self._came: deque[int] = deque()
        self._sent = self._got = self._acked = 0

    async def listen(self) -> str:
        path = f"{tempfile.gettempdir()}/{uuid.uuid4().hex[:12]}"
        self.listener.bind(path)
        self.listener.listen(1)
        return path

    async def accept(self) -> None:
        path = self.listener.getsockname()
        self.socket = self.listener.accept()[0]
        os.unlink(path)
        self._exchange()

    async def connect(self, address: str) -> None:
        self.socket.connect(address)
        self._exchange()

    def _exchange(self) -> None:
        """Each end gives the other two segments to read; only pages that are used take memory."""
        fds = [os.memfd_create("bench") for _ in range(2)]
        for fd in fds:
            os.ftruncate(fd, SEGMENT)
        socket.send_fds(self.socket, [b"f"], fds)
        _, theirs, _, _ = socket.recv_fds(self.socket, 1, 2)
        self._ours = [mmap.mmap(fd, SEGMENT) for fd in fds]
        self._theirs = [mmap.mmap(fd, SEGMENT) for fd in theirs]
        for fd in [*fds, *theirs]:
            os.close(fd)

    def _word(self) -> None:
        """Take in what the other end said: a message came, or one of ours was read."""
        if self._exactly(1) == b"a":
            self._acked += 1
        else:
            self._came.append(LENGTH.unpack(self._exactly(8))[0])

    async def send(self, data: Any) -> None:
        while self._sent - self._acked >= 2:
            self._word()
        self._ours[self._sent % 2][: len(data)] = data
        self._sent += 1
        self.socket.sendall(b"m" + LENGTH.pack(len(data)))

    async def recv(self) -> Any:
        if self._got:
            self.socket.sendall(b"a")  # nobody looks at the message before any more
        while not self._came:
            self._word()
        segment = self._theirs[self._got % 2]
        self._got += 1
        return memoryview(segment)[: self._came.popleft()]


class Distributed(AsyncioStreams):
    """dask.distributed's own comm, messages with one serialised array."""

    needs = "distributed"
    address = "tcp://127.0.0.1:0"

    async def listen(self) -> str:
        import asyncio

        from distributed.comm import listen

        self.came = asyncio.Event()
        self.listener = await listen(self.address, self._handle, deserialize=True)
        return str(self.listener.contact_address)

    async def _handle(self, comm: Any) -> None:
        self.comm = comm
        self.came.set()

    async def connect(self, address: str) -> None:
        from distributed.comm import connect

        self.comm = await connect(address, deserialize=True)

    async def send(self, data: Any) -> None:
        import numpy as np
        from distributed.protocol import to_serialize

        await self.comm.write({"data": to_serialize(np.frombuffer(data, "u1"))})

    async def recv(self) -> Any:
        return memoryview((await self.comm.read())["data"])

    async def close(self) -> None:
        await self.comm.close()


class DistributedZmq(Distributed):
    """The same over zfabric's comm."""

    needs = "zfabric.distributed"
    address = "zmq://127.0.0.1:0"

    def __init__(self) -> None:
        import zfabric.distributed  # noqa: F401 - registers the scheme

        super().__init__()


class Mpi(Way):
    """mpi4py; both ends are ranks of one mpiexec, so nobody listens."""

    needs = "mpi4py"

    def __init__(self) -> None:
        from mpi4py import MPI

        self.world = MPI.COMM_WORLD
        self.other = 1 - self.world.rank

    async def listen(self) -> str:
        return ""

    async def connect(self, address: str) -> None:
        pass

    async def send(self, data: Any) -> None:
        self.world.Send([data, self._byte()], self.other)

    @staticmethod
    def _byte() -> Any:
        from mpi4py import MPI

        return MPI.BYTE

    async def recv(self) -> Any:
        from mpi4py import MPI

        status = MPI.Status()
        self.world.Probe(self.other, status=status)
        place = bytearray(status.Get_count(MPI.BYTE))
        self.world.Recv([place, MPI.BYTE], self.other)
        return place


WAYS: dict[str, type[Way]] = {
    "zmq tcp": Zmq,
    "zmq tcp, 2 MiB parts": ZmqChunks,
    "zmq ipc": ZmqIpc,
    "zmq inproc": ZmqInproc,
    "plain socket": PlainSocket,
    "asyncio streams": AsyncioStreams,
    "tornado": Tornado,
    "multiprocessing pipe": Pipe,
    "shared memory": SharedMemory,
    "mpi": Mpi,
    "distributed tcp": Distributed,
    "distributed zmq": DistributedZmq,
}


def missing(name: str) -> str:
    """What has to be installed for a way; "" when nothing."""
    import shutil

    needs = WAYS[name].needs
    try:
        found = not needs or importlib.util.find_spec(needs) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return needs
    return "mpiexec" if name == "mpi" and not mpiexec() and not shutil.which("mpiexec") else ""


def mpiexec() -> str:
    """The mpiexec beside this interpreter, or on the path; "" when there is none."""
    import shutil
    import sys

    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    return beside if os.path.exists(beside) else shutil.which("mpiexec") or ""
