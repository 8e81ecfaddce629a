"""What a fabric tells of the links over which its values move."""

from __future__ import annotations

import zfabric


def filled(n: int) -> bytes:
    return b"z" * n


def test_links_are_told_by_both_ends() -> None:
    with zfabric.LocalFabric(n_workers=2, slots=1) as fabric, zfabric.Client(fabric) as client:
        assert client.submit(filled, 3_000_000).result() == filled(3_000_000)
        links = client.links()
        assert {link["at"] for link in links} <= {client.name, *client.workers()}
        for link in links:
            assert link["wire_nbytes"] == link["raw_nbytes"], "compressed within a host"
            assert link["peer_name"] and link["direction"] in ("in", "out")
