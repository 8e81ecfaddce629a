"""What the broker knows of each task, function and session.

A task's state is one of six, and says which fields mean something:

    WAITING   n_waiting inputs are not there yet
    READY     in the ready queue; every input can be had
    ASSIGNED  on `worker` as `attempt`; not necessarily started, and under the successor rule not
              necessarily ready: what it waits for is then on the same worker
    DONE      `value` is the inline blob, or `holders` have it in their stores (`nbytes`)
    FAILED    `status` and `value` are what its client is told
    RELEASED  nobody wants the value any more, but another value would need this task to be
              computed again; only the recipe is kept

             submit                      assign                Done
    (none) ─────────▶ WAITING ─▶ READY ─────────▶ ASSIGNED ─────────▶ DONE ──▶ RELEASED
                         ▲         ▲  worker lost,    │   error, cancel  │ holder   │ needed
                         └─────────┴──returned, ──────┘──────▶ FAILED    │ lost     │ again
                         ▲            slot died                          │          │
                         └───────────────────────────────────────────────┴──────────┘

A record with nobody left to want it, wait for it or be computed again from it is deleted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from zfabric.ids import try_of
from zfabric.messages import DEFAULT_OPTIONS, TaskOptions

if TYPE_CHECKING:
    from zfabric.core.placement import WorkerRecord

WAITING = 0
READY = 1
ASSIGNED = 2
DONE = 3
FAILED = 4
RELEASED = 5

STATE_NAMES = ("waiting", "ready", "running", "finished", "failed", "released")

UNFINISHED = frozenset((WAITING, READY, ASSIGNED))


class Try(NamedTuple):
    """An attempt that gave no value.

    how: ERROR, LATE, OVERSIZE, DIED or LOST (zfabric.messages).  text: where, and what happened.
    """

    how: int
    text: str
    attempt: int


NOT_LOST = -1
"""In the journal: the last try of a task was not LOST after all."""

TASK_NBYTES = 512
"""About what the record of a task takes, without what it carries."""


INPUT_NBYTES = 128
"""About what it takes that a task knows its input, and the input the task."""


class FunctionRecord:
    """A function's blob. Tasks hold the record, so it lives as long as one may need it, and counts
    for its session until then."""

    __slots__ = ("blob", "id", "name", "owner")

    def __init__(self, id_: int, name: str, blob: bytes, owner: ClientRecord) -> None:
        self.id = id_
        self.name = name
        self.blob = blob
        self.owner = owner
        owner.blob_nbytes += len(blob)

    def __del__(self) -> None:
        self.owner.blob_nbytes -= len(self.blob)


class TaskRecord:
    """One task and its value, as the broker sees them."""

    __slots__ = (
        "attempt",
        "dependents",
        "deps",
        "extra",
        "fn",
        "history",
        "holders",
        "id",
        "lineage",
        "n_waiting",
        "nbytes",
        "options",
        "owner",
        "payload",
        "state",
        "status",
        "value",
        "wanted",
        "worker",
    )

    def __init__(
        self, id_: int, fn: FunctionRecord | None, payload: bytes, owner: ClientRecord
    ) -> None:
        self.id = id_
        self.fn = fn
        """None: a value that a client put; it cannot be computed again."""
        self.payload = payload
        self.owner = owner
        self.options: TaskOptions = DEFAULT_OPTIONS
        self.deps: tuple[TaskRecord, ...] = ()
        self.extra = 0
        """Bytes that its options and inputs came with, for the account of its session."""
        self.dependents: dict[TaskRecord, None] | None = None
        """Tasks that still need this one's value, oldest first (a dict, as sets of records
        would come in an order that differs from run to run)."""
        self.lineage = 0
        """Stored values and failed tasks that would need this one to be made again."""
        self.n_waiting = 0
        self.wanted = True
        """The client that submitted it has not released it."""
        self.state = READY
        self.worker: WorkerRecord | None = None
        self.attempt = 0
        self.status = 0
        self.value: bytes | None = None
        self.nbytes = 0
        self.holders: set[WorkerRecord] | None = None
        self.history: list[Try] | None = None
        """Attempts that gave no value, oldest first."""

    def set_value(self, value: bytes | None) -> None:
        """Another value, or none, on its session's account."""
        self.owner.task_nbytes += len(value or b"") - len(self.value or b"")
        self.value = value

    @property
    def own_nbytes(self) -> int:
        """What it takes here."""
        return TASK_NBYTES + self.extra + len(self.payload) + len(self.value or b"")

    @property
    def name(self) -> str:
        """What people call it: its key, or its function and number."""
        return self.options.key or f"{self.fn.name if self.fn else 'data'}-{self.id:x}"

    @property
    def can_repeat(self) -> bool:
        """Whether it may run again to make its value once more."""
        return self.fn is not None and self.options.idempotent

    def story(self) -> str:
        """One line for people."""
        name = self.name
        where = f" on {self.worker.name}" if self.worker else ""
        return f"{name}: {STATE_NAMES[self.state]}{where}, attempt {try_of(self.attempt)}"


class ClientRecord:
    """A client session, and the rows that go out to it at the end of this turn."""

    __slots__ = (
        "blob_nbytes",
        "counter",
        "depth",
        "functions",
        "held_back",
        "ids",
        "is_full",
        "name",
        "number",
        "payloads",
        "refused",
        "statuses",
        "task_nbytes",
        "user",
    )

    def __init__(self, number: int, name: str, depth: int = 0, user: str = "") -> None:
        """user: whose key it came with; "" without keys."""
        self.number = number
        self.user = user
        self.task_nbytes = 0
        """What its tasks and their small values take here; see core.quota."""
        self.blob_nbytes = 0
        """What its functions take, until the last task that holds one is gone."""
        self.name = name
        self.depth = depth
        self.counter: int | None = None
        """Of a run: beyond the counters of all tasks that it ever had. None: it is no run."""
        self.functions: dict[int, FunctionRecord] = {}
        """Those that its rows may name, oldest first; see messages.MAX_FUNCTIONS."""
        self.ids: list[int] = []
        self.statuses = bytearray()
        self.payloads: list[bytes] = []
        self.held_back = False
        """Nothing goes out to it until it has said what it waits for."""
        self.refused: dict[int, bytes] = {}
        """With a journal: what there was no room for, until the client releases it. After a restart
        it is told again, as the client may not have heard it."""
        self.is_full = False
        """Nor until it has taken in what is on its way: meanwhile rows refer to values that the
        table holds anyway."""

    @property
    def nbytes(self) -> int:
        """All that it takes."""
        return self.task_nbytes + self.blob_nbytes
