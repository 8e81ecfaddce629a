"""Values beyond what 31 bits count."""

from __future__ import annotations

import pytest

from zfabric import Client
from zfabric.launch.local import LocalFabric

np = pytest.importorskip("numpy")

NBYTES = 2**31 + 12_345


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["on", "off"])
def test_a_buffer_of_more_than_two_gib(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFABRIC_SHARED_MEMORY", shared)
    with LocalFabric(1, slots=1) as fabric, Client(fabric.address) as client:
        made = client.submit(np.full, NBYTES, 7, "u1")
        ends = client.submit(lambda array: (len(array), int(array[-1])), made)
        assert ends.result(60) == (NBYTES, 7)
        array = made.result(60)
        assert len(array) == NBYTES and array[-1] == 7 and array[2**31] == 7


@pytest.mark.slow
def test_a_value_of_very_many_arrays() -> None:
    with LocalFabric(1, slots=1) as fabric, Client(fabric.address) as client:
        data = client.scatter({"many": [np.full(2048, n % 251, "u1") for n in range(66_000)]})
        ends = client.submit(lambda many: (len(many), int(many[-1][0])), data["many"])
        assert ends.result(60) == (66_000, 65_999 % 251)
