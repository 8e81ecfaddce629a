"""Memory that values have left is written over, and never memory that somebody still reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zfabric import Client
from zfabric.launch.local import LocalFabric

NBYTES = 2 * 2**20


def value_of(array: Any) -> int:
    """The number that fills an array, -1 for one with several."""
    return int(array[0]) if (array == array[0]).all() else -1


@pytest.mark.parametrize("shared", ["on", "off"])
def test_values_stay_what_they_were_while_others_come_and_go(
    shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZFABRIC_SHARED_MEMORY", shared)
    with LocalFabric(1, slots=2) as fabric, Client(fabric.address) as client:
        futures: dict[int, Any] = {}
        arrays: dict[int, Any] = {}
        for number in range(12):
            futures[number] = client.scatter(np.full(NBYTES, number, "u1"))
            told = {n: client.submit(value_of, future) for n, future in futures.items()}
            if number % 3:
                arrays[number] = client.gather(futures.pop(number))
            if number % 4 == 3:
                arrays.pop(min(arrays))
            assert {n: call.result(60) for n, call in told.items()} == {n: n for n in told}
            assert all(value_of(array) == n for n, array in arrays.items())
