"""Questions about tasks, which the broker can answer only with the help of workers.

Who asks why a task has not ended gets what the broker knows at once, if no worker has the task.
Where one has it, that worker is asked (Explain) and the answer waits for its word (Explained), at
most `WORD_S`: a worker that does not answer is an answer as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgpack import packb

from zfabric import messages as m
from zfabric.core.outbound import Outgoing
from zfabric.core.scheduler import Scheduler
from zfabric.core.tasks import ASSIGNED, TaskRecord
from zfabric.core.why import Silence, reasons
from zfabric.ids import COUNTER_BITS

WORD_S = 2.0
"""Seconds that a worker has to answer."""

MOST_ASKED = 256
"""Tasks per question."""


@dataclass(slots=True)
class _Open:
    """A question whose answer still lacks the words of `workers`."""

    client: int
    request: int
    stories: dict[int, dict[str, Any]]
    workers: set[int]
    until: float
    asked: dict[int, int] = field(default_factory=dict)
    """Task id -> number of the worker that was asked."""


class Questions:
    """The questions that are open."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._open: dict[int, _Open] = {}
        self._last = 0

    def why(self, client: int, question: m.Ask, silent_s: Silence, now: float) -> list[Outgoing]:
        """Ask("why") about ids, or about all tasks of that name."""
        tasks = self._named(question)[:MOST_ASKED]
        stories = self._stories(tasks, question, silent_s)
        opened = _Open(client, question.request, stories, set(), now + WORD_S)
        by_worker: dict[int, list[int]] = {}
        for task in tasks:
            if task.state == ASSIGNED and task.worker is not None:
                by_worker.setdefault(task.worker.number, []).append(task.id)
                opened.asked[task.id] = task.worker.number
        if not by_worker:
            return [_answer(opened)]
        self._last += 1
        opened.workers.update(by_worker)
        self._open[self._last] = opened
        return [(number, m.Explain(self._last, ids)) for number, ids in by_worker.items()]

    def known(self, question: m.Query, silent_s: Silence, trouble: str) -> list[dict[str, Any]]:
        """The same from the broker's table alone, at once.  trouble: what else keeps them."""
        tasks = self._named(question)[:MOST_ASKED]
        stories = list(self._stories(tasks, question, silent_s).values())
        if trouble:
            for story in stories:
                story["reasons"].append(["journal", f"the broker takes no work now: {trouble}"])
        return stories

    def explained(self, worker: int, message: m.Explained) -> list[Outgoing]:
        """A worker's word."""
        opened = self._open.get(message.ticket)
        if opened is None or worker not in opened.workers:
            return []
        for id_, code, text in zip(message.ids, message.codes, message.texts, strict=True):
            story = opened.stories.get(id_)
            if story is not None and opened.asked.get(id_) == worker:
                story["reasons"].append([code, text])
        return self._heard(message.ticket, opened, worker)

    def worker_left(self, worker: int) -> list[Outgoing]:
        """It will not answer any more."""
        said: list[Outgoing] = []
        for ticket, opened in list(self._open.items()):
            if worker in opened.workers:
                self._add(opened, worker, ["lost", "its worker was lost a moment ago"])
                said += self._heard(ticket, opened, worker)
        return said

    def client_left(self, client: int) -> None:
        """It will not hear the answers. Its number may be somebody else's soon, as that of a run,
        who would take them for answers to questions of its own."""
        for ticket, opened in list(self._open.items()):
            if opened.client == client:
                del self._open[ticket]

    def tick(self, now: float) -> list[Outgoing]:
        """Answers that have waited long enough."""
        said: list[Outgoing] = []
        for ticket, opened in list(self._open.items()):
            if now >= opened.until:
                text = f"its worker has not said more within {WORD_S:g} s"
                for worker in opened.workers:
                    self._add(opened, worker, ["silent", text])
                del self._open[ticket]
                said.append(_answer(opened))
        return said

    def wake_at(self) -> float | None:
        """When tick() has something to do; None: nothing is open."""
        return min((opened.until for opened in self._open.values()), default=None)

    def _heard(self, ticket: int, opened: _Open, worker: int) -> list[Outgoing]:
        opened.workers.discard(worker)
        if opened.workers:
            return []
        del self._open[ticket]
        return [_answer(opened)]

    def _add(self, opened: _Open, worker: int, reason: list[str]) -> None:
        for id_, asked in opened.asked.items():
            if asked == worker:
                opened.stories[id_]["reasons"].append(reason)

    def _stories(
        self, tasks: list[TaskRecord], question: m.Ask | m.Query, silent_s: Silence
    ) -> dict[int, dict[str, Any]]:
        stories = {task.id: self._story(task, silent_s) for task in tasks}
        for id_ in question.about:
            if id_ not in stories:
                text = "the broker does not know it: it was released, or is on its way there"
                stories[id_] = {"id": id_, "key": "", "state": "unknown"}
                stories[id_]["reasons"] = [["unknown", text]]
        return stories

    def _named(self, question: m.Ask | m.Query) -> list[TaskRecord]:
        tasks = self._scheduler.tasks
        if question.text:
            return [task for task in tasks.values() if question.text in names_of(task)]
        return [task for id_ in question.about if (task := tasks.get(id_)) is not None]

    def _story(self, task: TaskRecord, silent_s: Silence) -> dict[str, Any]:
        return {
            "id": task.id,
            "key": task.name,
            "owner": task.owner.name,
            "state": task.story().split(": ", 1)[1],
            "reasons": [list(r) for r in reasons(self._scheduler.placer, task, silent_s)],
            "history": [one.text for one in task.history or ()],
        }


def names_of(task: TaskRecord) -> tuple[str, ...]:
    """What people may call it: its key, function-number as its client shows it, its full name."""
    short = f"{task.fn.name if task.fn else 'data'}-{task.id & ((1 << COUNTER_BITS) - 1)}"
    return (task.options.key, short, task.name) if task.options.key else (short, task.name)


def _answer(opened: _Open) -> tuple[int, m.Message]:
    return opened.client, m.Answer(opened.request, packb(list(opened.stories.values())))
