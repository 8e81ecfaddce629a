"""What peers say to one another: frozen records, each with many rows, as parallel columns.

Records are named tuples: frozen, and made in a third of a dataclass's time, which counts when a
lone task causes eight of them. A record says nothing of bytes; `zfabric.wire` makes it frames and
back, and checks it. Columns (`ids`, `statuses`, `payloads`, ...) have one entry per row and equal
lengths. What few rows need (dependencies, options) is sparse: a list of (row index, ...) pairs.
`docs/protocol.md` tells the story of who says what when.

    client -> broker   Submit Release Cancel Retry Register Ask Acquire Unlock
    broker -> client   Results Answer Locked
    broker -> worker   Run Recall Drop Give Free Forget Explain Admit
    worker -> broker   Done Returned Missing Holds Explained
    worker -> client   Output, by way of the broker
    peer -> broker     Inventory
    both ways          Hello Welcome Refuse Beat Nack Bye Relay
    data channels      Fetch Chunk Put PutDone NotHere
    relayed            LinksWanted LinksTold
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

# --- How a row ended: one byte per row in Done and Results ------------------------------------

VALUE = 0
"""A value that rides along; the payload is its inline blob."""
STORED = 1
"""A value in a worker's store. Done: payload is its size, 8 bytes little-endian.
Results: payload is msgpack [nbytes, [[worker number, data address], ...]]."""
ERROR = 2
"""The task raised; the payload is the exception as `codec.exceptions` dumps it, with the names of
its classes behind it as `core.retry` puts them there."""
DIED = 3
"""Done only: the slot's process died while the row ran; payload is msgpack [text]."""
CANCELLED = 4
"""The task will not run, or its outcome is not wanted. No payload."""
KILLED = 5
"""Results only: it killed its process too often; payload is msgpack [text, [attempt texts]]."""
LOST = 6
"""Results only: its value or its worker is gone; payload is msgpack [text]."""
UNFIT = 7
"""Results only: no worker has what it asks for; payload is msgpack [text]."""

LATE = 8
"""It ran longer than it may, and was killed; payload is msgpack [text]."""
OVERSIZE = 9
"""It took more memory than it may, and was killed; payload is msgpack [text]."""
UNKNOWN = 10
"""Results only: it may have run, and must not run again; payload is msgpack [text]."""

FULL = 11
"""Results only: the broker has no room for it; payload is msgpack [text]."""

N_STATUSES = 12

# --- How a dependency reaches the worker ------------------------------------------------------

INLINE = 0
"""(id, INLINE, blob): the value rides along."""
LOCAL = 1
"""(id, LOCAL, nbytes): the value is, or will be, at the worker that gets the row."""
REMOTE = 2
"""(id, REMOTE, [nbytes, [[worker number, data address], ...]]): fetch it there."""

Dependency = tuple[int, int, object]

CLIENT = "client"
WORKER = "worker"


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What a row asks for beyond the defaults."""

    priority: int = 0
    """Higher runs sooner; -2**31 .. 2**31."""
    retries: int = 0
    """How often the task runs again after it raised, or was killed by a limit."""
    resources: dict[str, float] = field(default_factory=dict)
    """Amounts it occupies on a worker while it runs, e.g. {"GPU": 1}."""
    workers: tuple[str, ...] = ()
    """Names of the workers that may run it; empty: any."""
    key: str = ""
    """The user's name for it, for people; the client de-duplicates by it."""
    timeout_s: float = 0.0
    """Seconds that an attempt may run before it is killed; 0: any."""
    retry_on: tuple[str, ...] = ()
    """Names of the exceptions after which it runs again, as `core.retry`; empty: all."""
    idempotent: bool = True
    """Whether it may run again when nobody knows whether it has run."""
    must_fit: bool = True
    """Whether it ends at once where no worker could ever run it; else it waits for one."""

    @property
    def nbytes(self) -> int:
        """About what they take in a frame: texts can be long, and four bytes a character."""
        names = [*self.workers, *self.resources, *self.retry_on, self.key]
        return 64 + 4 * sum(map(len, names)) + 8 * len(names) + 9 * len(self.resources)


DEFAULT_OPTIONS = TaskOptions()

MAX_BUFFERS = 1 << 16
"""Of one value."""

MAX_FUNCTIONS = 1024
"""Functions that a client may name without sending them again. Both ends forget the one that was
sent first with each one sent beyond that, so neither has to tell the other."""

NOTHING: Mapping[str, float] = MappingProxyType({})


# --- Sessions: not sequenced ------------------------------------------------------------------


class Hello(NamedTuple):
    """A peer's first message; repeated until Welcome or Refuse comes."""

    role: str
    name: str
    zfabric: str
    python: str
    host: str
    pid: int
    depth: int = 0
    """0 for a user's client, n + 1 for one made inside a task of a client of depth n."""
    slots: int = 0
    threads: bool = False
    resources: Mapping[str, float] = NOTHING
    data_address: str = ""
    """Where a worker serves its values; "" when nobody can dial in."""
    previous: int = 0
    """The token of a session that this one goes on from: another one for a worker, which tells in
    an Inventory what it still has; the same one for a client. 0: there was none."""
    acked: int = 0
    """The highest number of ours that the broker of that session acknowledged."""
    run: str = ""
    """The named run whose tasks a client takes up, or begins."""


class Welcome(NamedTuple):
    """The broker takes the session."""

    number: int
    name: str
    zfabric: str
    inline_limit: int
    beat_s: float
    dead_s: float
    resumed: bool = False
    """The tasks of the session that a client goes on from, or of the run it named, are here."""
    counter: int = 0
    """The lowest that the client may use in the ids of new tasks."""


class Refuse(NamedTuple):
    """The broker does not take the session, or no longer knows it (code "unknown")."""

    code: str
    text: str


class Beat(NamedTuple):
    """I live, and the last message that I sent in sequence was number `sent`."""

    sent: int
    load: tuple[int, ...] = ()
    """Workers: (rows held, rows running, slots, values held, bytes of them in memory, memory of all
    processes in bytes, bytes of values on disk, limit of those in memory, 1 if that is reached,
    1 if the disk takes no values)."""
    relayed: int = 0
    """Bytes that Relays have brought in this session, so that more may follow."""


class Nack(NamedTuple):
    """I still miss message number `expected`: send it and all later ones again."""

    expected: int


class Relay(NamedTuple):
    """Frames for another session, passed on unread. Not sequenced: who asks, asks again.

    peer: session number, of the target towards the broker and of the source away from it.
    """

    peer: int
    frames: tuple[bytes, ...]


# --- Sequenced --------------------------------------------------------------------------------


class Bye(NamedTuple):
    """The last message of a session: the peer closes and keeps nothing."""

    reason: str = ""


class Submit(NamedTuple):
    """client -> broker: run these calls, in this order of age."""

    functions: Sequence[tuple[int, str, bytes]]
    """(function id, name, blob) of those that the broker has not seen from this session."""
    ids: Sequence[int]
    fns: Sequence[int]
    payloads: Sequence[bytes]
    """The arguments; b"" when they are a value of their own: the last dependency."""
    deps: Sequence[tuple[int, Sequence[int]]] = ()
    """(row, ids of the values that it needs, in the order in which its arguments use them)."""
    options: Sequence[tuple[int, TaskOptions]] = ()


class Release(NamedTuple):
    """client -> broker: nobody here wants these any more."""

    ids: Sequence[int]


class Cancel(NamedTuple):
    """client -> broker: end these, whoever waits for them."""

    ids: Sequence[int]


class Retry(NamedTuple):
    """client -> broker: run these failed ones again."""

    ids: Sequence[int]


class Register(NamedTuple):
    """client -> broker: I have put these values into workers' stores."""

    ids: Sequence[int]
    sizes: Sequence[int]
    holders: Sequence[Sequence[int]]
    """Session numbers of the workers that hold each."""


class Ask(NamedTuple):
    """client -> broker: tell me. `what` is "info", "locked", "sync" (nothing: all that
    was said before has been taken in), "runs", "run" (its tasks with keys), "end run" or, about
    tasks, "locate", "cancel_waiting" and "why"."""

    request: int
    what: str
    about: Sequence[int] = ()
    text: str = ""
    """"why": the name of the tasks, in place of their ids.  "locked": the lock's name.
    "run": an id; its page of the answer begins behind that.  "end run": the run's name."""


class Answer(NamedTuple):
    """broker -> client: msgpack of the answer to a request."""

    request: int
    payload: bytes


class Alarm(NamedTuple):
    """broker -> client: why no work is taken now, none is acknowledged and no result comes;
    "": all that is over. Said again with each beat."""

    text: str


class Query(NamedTuple):
    """client -> broker: as Ask, out of sequence, and may be lost: while there is an alarm nothing
    that is in sequence is taken in. `what` is one of QUERIES."""

    request: int
    what: str
    about: Sequence[int] = ()
    text: str = ""


QUERIES = frozenset(("info", "runs", "why"))
"""Questions whose answers promise nothing and change nothing."""


class Reply(NamedTuple):
    """broker -> client: msgpack of the answer to a Query; may be lost."""

    request: int
    payload: bytes


class Acquire(NamedTuple):
    """client -> broker: I want the lock of that name. Answered by Locked, once it is mine; without
    `waits`, at once. request: a number that this session has not used before."""

    request: int
    name: str
    waits: bool


class Unlock(NamedTuple):
    """client -> broker: what I asked for in that Acquire I neither hold nor want any more."""

    request: int


class Locked(NamedTuple):
    """broker -> client: you hold what you asked for in that Acquire; or, not `held`, somebody else
    does, and you did not want to wait."""

    request: int
    held: bool


class Results(NamedTuple):
    """broker -> client: these ended."""

    ids: Sequence[int]
    statuses: bytes
    payloads: Sequence[bytes]


class Run(NamedTuple):
    """broker -> worker: run these rows, in this order."""

    functions: Sequence[tuple[int, str, bytes]]
    """Those that this worker has not seen."""
    ids: Sequence[int]
    attempts: Sequence[int]
    fns: Sequence[int]
    payloads: Sequence[bytes]
    deps: Sequence[tuple[int, Sequence[Dependency]]] = ()
    limits: Sequence[tuple[int, float]] = ()
    """(row, seconds that it may run)."""


class Recall(NamedTuple):
    """broker -> worker: give these back if they have not started."""

    ids: Sequence[int]


class Drop(NamedTuple):
    """broker -> worker: forget these rows, and kill those that run. The end of each is told: by
    Done, with CANCELLED, where it had begun, else by Returned."""

    ids: Sequence[int]


class Give(NamedTuple):
    """broker -> worker: keep these small values, as inline blobs; rows that follow name them as
    LOCAL. For rows whose inline dependencies would not fit in one message."""

    ids: Sequence[int]
    payloads: Sequence[bytes]


class Free(NamedTuple):
    """broker -> worker: forget these values."""

    ids: Sequence[int]


class Forget(NamedTuple):
    """broker -> worker: forget these functions."""

    fns: Sequence[int]


class Admit(NamedTuple):
    """broker -> worker: these public keys (32 bytes each), and no others, may fetch and put values
    where you serve them. Follows the Welcome where a fabric has keys, and each change of them."""

    keys: Sequence[bytes]


class Done(NamedTuple):
    """worker -> broker: these attempts ended."""

    ids: Sequence[int]
    attempts: Sequence[int]
    statuses: bytes
    payloads: Sequence[bytes]
    credit: int
    """How many rows, running ones included, this worker is willing to hold from now on."""


class Returned(NamedTuple):
    """worker -> broker: these rows were not started and are yours again. It answers each Recall,
    even when nothing could be given back."""

    ids: Sequence[int]
    attempts: Sequence[int]
    credit: int


class Missing(NamedTuple):
    """worker -> broker: these values could not be fetched from any of the places told; the
    rows that need them are given back in a Returned that follows."""

    ids: Sequence[int]


class Holds(NamedTuple):
    """worker -> broker: I now hold copies of these values as well."""

    ids: Sequence[int]


class Inventory(NamedTuple):
    """The first message of a session that goes on from another one: what the peer has, or wants.

    Worker: rows that are here or whose end the broker may not have heard of, and values in the
    store. Answered by Drop and Free for what is not to be kept. Client: `ids` of the tasks whose
    end it does not know (`attempts` are 0), answered by Results for those that have ended.
    """

    ids: Sequence[int]
    attempts: Sequence[int]
    values: Sequence[int]
    sizes: Sequence[int]
    credit: int
    """Workers: rows, these included, that it is willing to hold. 0: another part follows."""
    n_dropped: int = 0
    """How many of the rows, the last ones, it was told to drop: they run on until they are dead."""


class Explain(NamedTuple):
    """broker -> worker: say what keeps these rows. Answered by Explained."""

    ticket: int
    ids: Sequence[int]


class Explained(NamedTuple):
    """worker -> broker: what each row waits for, as a code for programs and a text for people."""

    ticket: int
    ids: Sequence[int]
    codes: Sequence[str]
    texts: Sequence[str]


class Output(NamedTuple):
    """worker -> broker -> owner of the tasks: what these attempts wrote to stdout and stderr since
    the last such message. Ahead of the Done or Results that tells of their end, as a rule."""

    ids: Sequence[int]
    attempts: Sequence[int]
    starts: Sequence[int]
    """Where each text begins in what its attempt has written, in bytes. What is between two pieces
    was left out; what comes again, as a worker whose broker was away says it again, is known."""
    texts: Sequence[bytes]


# --- Data channels: no session, no sequence ---------------------------------------------------


class Fetch(NamedTuple):
    """Send me bytes [offset, offset + length) of a value, laid out as `codec.layout` says."""

    id: int
    offset: int
    length: int
    codecs: Sequence[str] = ()
    """Names of what I can decompress; empty: send it as it is."""
    rate: int = 0
    """Bytes/s that I see arrive on this link; 0 while I do not know."""
    number: int = 0
    """Mine, of a worker that will serve the value itself; 0: I shall not."""
    address: str = ""
    """My data address, where others get the value then."""


class Chunk(NamedTuple):
    """A part of a value. `sizes` are its buffers' sizes in bytes, from which `codec.layout`
    tells where each begins."""

    id: int
    offset: int
    sizes: Sequence[int]
    data: bytes | memoryview
    packing: bytes = b""
    """How `data` is compressed, as `codec.compress` says it; empty: not at all."""


class Put(NamedTuple):
    """Keep this part of a value; answered by PutDone once all parts are there."""

    id: int
    offset: int
    sizes: Sequence[int]
    data: bytes | memoryview
    packing: bytes = b""


class PutDone(NamedTuple):
    """The value is in the store, whole. `error` says why not, else ""."""

    id: int
    error: str = ""


class NotHere(NamedTuple):
    """I do not hold that value, or shall not give it to you: ask the others first."""

    id: int
    others: Sequence[tuple[int, str]] = ()
    """(worker's number, data address) of who has the value."""


class LinksWanted(NamedTuple):
    """client -> worker, relayed: tell me of the links over which you move values."""

    request: int


class LinksTold(NamedTuple):
    """worker -> client, relayed: msgpack of what `runtime.link_book` reports."""

    request: int
    payload: bytes


Message = (
    Hello
    | Welcome
    | Refuse
    | Beat
    | Nack
    | Relay
    | Bye
    | Submit
    | Release
    | Cancel
    | Retry
    | Register
    | Ask
    | Answer
    | Acquire
    | Unlock
    | Locked
    | Results
    | Run
    | Recall
    | Drop
    | Give
    | Free
    | Forget
    | Admit
    | Done
    | Returned
    | Missing
    | Holds
    | Explain
    | Explained
    | Output
    | Inventory
    | Fetch
    | Chunk
    | Put
    | PutDone
    | NotHere
    | LinksWanted
    | LinksTold
    | Alarm
    | Query
    | Reply
)
