"""`Future`: a user's handle on the outcome of one task."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from zfabric import ids
from zfabric.client.reading import exception_of, traceback_text, value_of
from zfabric.codec.references import Reference
from zfabric.core.submitter import LOADED, PENDING, Outcome
from zfabric.messages import (
    CANCELLED,
    ERROR,
    FULL,
    KILLED,
    LATE,
    LOST,
    OVERSIZE,
    STORED,
    UNFIT,
    UNKNOWN,
    VALUE,
)

if TYPE_CHECKING:
    from zfabric.client.client import Client
    from zfabric.client.why import TaskStory

STATUS_NAMES = {
    PENDING: "pending",
    VALUE: "finished",
    STORED: "finished",
    LOADED: "finished",
    ERROR: "error",
    CANCELLED: "cancelled",
    KILLED: "error",
    LOST: "lost",
    UNFIT: "error",
    LATE: "error",
    OVERSIZE: "error",
    UNKNOWN: "error",
    FULL: "error",
}

FINISHED = frozenset({VALUE, STORED, LOADED})
FAILED = frozenset({ERROR, CANCELLED, KILLED, LOST, UNFIT, LATE, OVERSIZE, UNKNOWN, FULL})


class Future(Reference):
    """The value of a task, now or later. Made by `Client.submit`, `map` and `scatter`.

    When the last reference to it goes, the fabric forgets the task and its value; a task that
    has not run yet then never does. As an argument of another task it stands for its value.
    """

    __slots__ = ("__weakref__", "_client", "_outcome", "task_id")

    def __init__(self, client: Client, outcome: Outcome) -> None:
        self._client = client
        self._outcome = outcome
        self.task_id = outcome.id

    def __del__(self) -> None:
        # Any thread, any moment, also in the middle of the I/O thread's work: only append. The
        # table keeps the outcome until its Release leaves, but nobody can ask for its value.
        self._outcome.value = None
        self._client._drop(self.task_id)

    @property
    def key(self) -> str:
        """The task's name for people: the function's name and a number, or the key given."""
        outcome = self._outcome
        name = self._client._submitter.function_name(outcome.fn) if outcome.fn else "data"
        return f"{name}-{ids.counter_of(outcome.id)}"

    @property
    def client(self) -> Client:
        """The client that it belongs to."""
        return self._client

    @property
    def status(self) -> str:
        """pending, finished, error, cancelled or lost."""
        return STATUS_NAMES[self._outcome.status]

    def done(self) -> bool:
        """Whether the task has ended, in whatever way."""
        return self._outcome.status != PENDING

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._outcome.status == CANCELLED

    def result(self, timeout: float | None = None) -> Any:
        """The task's value; waits for it, at most `timeout` seconds.

        Raises what the task raised, TaskCancelled, KilledTask, TaskLost, DataLost, NoWorkerFits;
        ResultTimeout (a TimeoutError) after `timeout`, and the task goes on.
        """
        outcome = self._outcome
        if outcome.status == LOADED:
            return outcome.value
        return value_of(self, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What result() would raise, or None for a task with a value. Waits like result().

        Raises TaskCancelled for a cancelled one, as concurrent.futures does.
        """
        return exception_of(self, timeout)

    def traceback(self, timeout: float | None = None) -> str | None:
        """The remote traceback of a failed task as text, None for one with a value."""
        error = self.exception(timeout)
        return None if error is None else traceback_text(error)

    def why(self) -> TaskStory:
        """Why the task has not ended: what it waits for, or where it runs since when. Print it.

        Asks the broker, which asks the worker that has the task; takes milliseconds when both are
        well, and never raises because they are not: then that is the reason.
        """
        return self._client.why(self)[0]

    def logs(self) -> str:
        """What the task has written to stdout and stderr so far, on all its tries; "" if nothing.

        Also of one that runs, or whose process died. At most the first and the last 32 KiB;
        `[... n bytes left out ...]` stands for what is missing. Gone with the future.
        """
        text = self._client._submitter.output.texts.get(self.task_id)
        return "" if text is None else str(text)

    def cancel(self) -> bool:
        """End the task, whoever waits for it. Whether it is cancelled now.

        A running one is killed with its slot, which is replaced; see `Client.cancel`.
        """
        self._client.cancel(self)
        return self._outcome.status == CANCELLED

    def retry(self) -> None:
        """Run a failed task again; this future becomes pending. Others are left alone."""
        self._client.retry(self)

    def release(self) -> None:
        """Forget the task and its value now, rather than when the last reference goes."""
        self._client._drop(self.task_id)
        self._client._io.release_now()

    def add_done_callback(self, callback: Callable[[Future], object]) -> None:
        """Call callback(future) in a helper thread once the task has ended, in whatever way.

        What it raises is logged. Callbacks of one client run one after the other.
        """
        self._client._callbacks.when_done(self, callback)

    def __await__(self) -> Generator[Any, None, Any]:
        from zfabric.client.awaiting import result_async

        return result_async(self).__await__()

    def __repr__(self) -> str:
        return f"<Future {self.key} {self.status}>"


class NamedFuture(Future):
    """A future whose key was given by the user or computed from its arguments."""

    __slots__ = ("_key",)

    def __init__(self, client: Client, outcome: Outcome, key: str) -> None:
        super().__init__(client, outcome)
        self._key = key

    @property
    def key(self) -> str:
        """The task's name."""
        return self._key
