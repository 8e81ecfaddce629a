"""A fake broker and a client of it, for the tests of the client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.unit.client_broker import FakeBroker
    from zfabric.client import Client


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    from tests.unit.client_broker import fake_broker

    with fake_broker(tmp_path) as started:
        yield started


@pytest.fixture
def client(broker: FakeBroker) -> Iterator[Client]:
    from zfabric.client import Client

    with Client(broker.address, timeout=10) as opened:
        yield opened
