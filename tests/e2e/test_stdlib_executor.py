"""CPython's own tests of executors, run on ours.

They come with some builds of Python and not with others; where they are missing, they are
skipped. What they ask of a private attribute, of starting by name in a fresh interpreter, or of
an argument that ours does not have (max_workers, initializer), is left out by name.
"""

from __future__ import annotations

import gc
import unittest
from typing import Any, ClassVar

import pytest

import zfabric
from zfabric.client.executor import ClientExecutor

for _module in ("executor", "test_as_completed", "test_shutdown", "test_wait"):
    pytest.importorskip(
        f"test.test_concurrent_futures.{_module}",
        reason="this Python has no test.test_concurrent_futures",
        exc_type=ImportError,
    )

from test.test_concurrent_futures import (  # noqa: E402
    executor,
    test_as_completed,
    test_shutdown,
    test_wait,
)

pytestmark = pytest.mark.slow

LEFT_OUT = {
    "test_max_workers_negative",
    "test_interpreter_shutdown",
    "test_submit_after_interpreter_shutdown",
    "test_hang_gh83386",
    "test_hang_gh94440",
}


class FabricMixin:
    """What their util.ExecutorMixin does, on one fabric for a whole class."""

    worker_count = 5
    kind: ClassVar[str]
    client: ClassVar[zfabric.Client]
    executor: ClientExecutor

    @classmethod
    def setUpClass(cls) -> None:
        cls.client = zfabric.Client(slots=cls.worker_count, kind=cls.kind)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.client.close()
        gc.collect()

    def setUp(self) -> None:
        self.executor = self.client.get_executor()

    def tearDown(self) -> None:
        self.executor.shutdown(wait=True)
        del self.executor


class ProcessMixin(FabricMixin):
    kind = "process"


class ThreadMixin(FabricMixin):
    kind = "thread"


def make(theirs: type, mixin: type[FabricMixin]) -> type:
    """A test case of their tests on our executor."""
    name = f"Test{theirs.__name__.removesuffix('Tests').removesuffix('Test')}On{mixin.kind.title()}"
    left_out: dict[str, Any] = {name: None for name in LEFT_OUT if hasattr(theirs, name)}
    return type(name, (mixin, theirs, unittest.TestCase), {**left_out, "__module__": __name__})


for _theirs in (
    executor.ExecutorTest,
    test_as_completed.AsCompletedTests,
    test_wait.WaitTests,
    test_shutdown.ExecutorShutdownTest,
):
    for _mixin in (ProcessMixin, ThreadMixin):
        _made = make(_theirs, _mixin)
        globals()[_made.__name__] = _made
del _made, _theirs, _mixin
