"""Why tasks have not ended: the broker's and their workers' reasons, as one story per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgpack

from zfabric.errors import ResultTimeout, UsageError

if TYPE_CHECKING:
    from zfabric.client.client import Client
    from zfabric.client.future import Future

ANSWER_S = 5.0
"""Seconds for the broker's answer; it waits 2 s for its workers' words itself."""

MOST_ASKED = 256
"""Tasks per question."""


class TaskStory(NamedTuple):
    """Where a task is and what keeps it there. `str()` of it is text for people.

    reasons: (code, text) pairs, the nearest cause first; never empty.
    history: one text per attempt that gave no value, oldest first.
    """

    key: str
    state: str
    reasons: tuple[tuple[str, str], ...]
    history: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.key}: {self.state}", *(f"  {text}" for _, text in self.reasons)]
        lines += [f"  earlier: {text}" for text in self.history]
        return "\n".join(lines)


def stories_of(client: Client, futures: Sequence[Future]) -> list[TaskStory]:
    """One story per future, in their order; at most MOST_ASKED questions in one go."""
    told: dict[int, TaskStory] = {}
    pending = [future for future in futures if not future.done()]
    for start in range(0, len(pending), MOST_ASKED):
        part = pending[start : start + MOST_ASKED]
        try:
            told.update(_ask(client, [future.task_id for future in part], ""))
        except ResultTimeout:
            text = (
                f"the broker at {client.address} has not answered for {ANSWER_S:g} s: it is down, "
                "stopped, or cannot be reached; this client goes on trying"
            )
            for future in part:
                told[future.task_id] = TaskStory("", "pending", (("no answer", text),))
    return [_of(future, told.get(future.task_id)) for future in futures]


def stories_named(client: Client, key: str) -> list[TaskStory]:
    """The stories of all tasks with that key, or name as status and errors show it, whichever
    client they belong to. Empty when the broker knows none."""
    if not isinstance(key, str) or not key:
        raise UsageError(f"why() takes futures or the key of a task, not {key!r}")
    return list(_ask(client, [], key).values())


def _ask(client: Client, ids: list[int], key: str) -> dict[int, TaskStory]:
    answer = msgpack.unpackb(client._io.ask("why", ANSWER_S, ids, key))
    return {story["id"]: _read(story) for story in answer}


def _read(story: dict[str, object]) -> TaskStory:
    reasons = tuple((code, text) for code, text in story["reasons"])  # type: ignore[attr-defined]
    history = tuple(story.get("history", ()))  # type: ignore[arg-type]
    return TaskStory(str(story["key"]), str(story["state"]), reasons, history)


def _of(future: Future, story: TaskStory | None) -> TaskStory:
    if story is None or future.done():
        return TaskStory(future.key, future.status, (("ended", f"it has ended: {future.status}"),))
    return story._replace(key=future.key)
