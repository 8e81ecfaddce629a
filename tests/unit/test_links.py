"""Links are measured right whatever comes over them, and the choice is near the better one.

`Wire` is a model of one link in one thread of time: a codec whose speed depends on the data, a
wire, and a receiver that asks for a few parts at a time. It runs the real Packer and the real
Inbound and Outbound records, and takes milliseconds per cell.
"""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import pytest

from zfabric.codec.compress import CODEC, Compressed, Header
from zfabric.config import Settings
from zfabric.core.links import Inbound, Meter, Outbound
from zfabric.messages import Fetch
from zfabric.runtime.packing import Packer

MiB = 2**20
PART = 2 * MiB
WINDOW = 4
BUFFER = bytes(PART)


class Kind(NamedTuple):
    """What lz4 does with some data, as measured: ratios along the value, bytes/s both ways."""

    ratios: tuple[float, ...]
    compress: float
    decompress: float


KINDS = {
    "zeros": Kind((0.005,), 7e9, 6e9),
    "arange": Kind((0.01,), 4e9, 5e9),
    "smooth": Kind((0.62,), 1.4e9, 2.5e9),
    "sparse": Kind((0.1,), 2e9, 4e9),
    "text": Kind((0.55,), 0.6e9, 2e9),
    "random": Kind((1.0,), 3e9, 6e9),
    "compressed": Kind((1.0,), 3e9, 6e9),
    "mixed": Kind((0.05, 0.05, 0.05, 1.0), 2e9, 4e9),
}
LINKS = {"10 Mbit": 1.2e6, "100 Mbit": 12e6, "1 Gbit": 118e6, "10 Gbit": 1.15e9, "loopback": 2.5e9}


class Wire:
    """One transfer. now: seconds so far, of the sender; `ended` of the receiver."""

    def __init__(self, kind: Kind, rate: float, mode: str, latency: float = 0.0002) -> None:
        self.kind, self.rate, self.latency = kind, rate, latency
        self.now = 0.0
        self.ratio = 1.0
        self.inbound, self.outbound = Inbound(), Outbound()
        self.packer = Packer(
            Settings(compression=mode), codec=self, clock=lambda: self.now, rng=Random(1)
        )
        self.mode = mode

    def codecs(self) -> tuple[str, ...]:
        return (CODEC,)

    def compressed_size(self, sample: Any, itemsize: int) -> int:
        self.now += len(sample) / self.kind.compress
        return max(int(len(sample) * self.ratio), 1)

    def compress(self, buffer: Any, itemsize: int) -> Compressed | None:
        self.now += len(buffer) / self.kind.compress
        if self.ratio > 0.9:
            return None
        return Compressed(
            Header(CODEC, 2, len(buffer)).pack(), BUFFER[: int(len(buffer) * self.ratio)]
        )

    def move(self, nbytes: int) -> float:
        """Seconds until all of a value has arrived."""
        sizes = [64 * 1024] + [PART] * (nbytes // PART)
        began = wire_free = receiver_free = self.now
        asked: list[tuple[float, int]] = []

        def ask(count: int) -> None:
            for _ in range(min(count, len(sizes) - len(asked))):
                self.inbound.asked(receiver_free)
                asked.append((receiver_free, self.inbound.rate))

        ask(1)  # the first part goes alone
        for place, size in enumerate(sizes):
            asked_at, rate = asked[place]
            self.ratio = self.kind.ratios[len(self.kind.ratios) * place // len(sizes)]
            self.now = max(self.now, asked_at + self.latency)
            packing, data = self.packer.pack(
                self.outbound, Fetch(1, place, size, (CODEC,), rate), BUFFER[:size]
            )
            wire_free = max(wire_free, self.now) + len(data) / self.rate
            arrived = max(wire_free + self.latency, receiver_free)
            unpack_s = size / self.kind.decompress if packing else 0.0
            receiver_free = arrived + unpack_s
            self.inbound.came(len(data), size, arrived, unpack_s)
            ask(1 if place else WINDOW)
        self.now = receiver_free
        return receiver_free - began


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_is_near_the_better_one(kind: str, link: str) -> None:
    # Two seconds of the raw link, so that beginnings do not hide what the choice costs.
    nbytes = int(LINKS[link] * 2) // PART * PART + 8 * PART
    seconds = {
        mode: Wire(KINDS[kind], LINKS[link], mode).move(nbytes)
        for mode in ("auto", "off", "always")
    }
    better = min(seconds["off"], seconds["always"])
    assert seconds["auto"] <= 1.1 * better, seconds


def test_a_link_that_grows_faster_is_noticed() -> None:
    wire = Wire(KINDS["smooth"], 12e6, "auto")
    wire.move(16 * PART)
    assert wire.outbound.verdicts["pays"] > 10
    wire.rate = 2.5e9
    before = wire.inbound.rate
    for _ in range(40):
        wire.move(64 * PART)
    assert wire.inbound.rate > 20 * before
    assert wire.outbound.verdicts["slower"] > 1000


def test_bursts_do_not_fool_the_meter() -> None:
    meter = Meter()
    for _ in range(20):  # three parts wait in our queue for each that we wait for
        meter.add(PART, 0.0799)
        for _ in range(3):
            meter.add(PART, 0.0000333)
    assert meter.rate == pytest.approx(4 * PART / 0.08, rel=0.2)


def test_a_silence_between_values_is_not_the_link() -> None:
    link = Inbound()
    now = 0.0
    for _ in range(50):
        now += 10.0
        for _ in range(WINDOW):
            link.asked(now)
        for _ in range(WINDOW):
            now += 0.02
            link.came(PART, PART, now)
    assert link.rate == pytest.approx(PART / 0.02, rel=0.01)
    assert link.round_trip == pytest.approx(0.02)


def test_what_never_came_does_not_count_as_time() -> None:
    link = Inbound()
    for _ in range(WINDOW):
        link.asked(0.0)
    link.silenced()
    link.asked(100.0)
    link.asked(100.0)
    link.came(PART, PART, 100.1)
    link.came(PART, PART, 100.2)
    assert link.rate == pytest.approx(PART / 0.1)


def test_compressed_parts_only_raise_what_is_known() -> None:
    link = Inbound()
    link.asked(0.0)
    link.came(64 * 1024, 64 * 1024, 0.001)
    known = link.rate
    for n in range(20):
        link.asked(float(n))
        link.asked(float(n))
        link.came(1000, PART, n + 0.1)
        link.came(1000, PART, n + 0.2)
    assert link.rate == known
    assert link.as_dict()["verdicts"] == {"raw": 1, "packed": 40}


@pytest.mark.parametrize(
    ("mode", "codecs", "reason"),
    [
        ("off", (CODEC,), "off"),
        ("auto", (), "not asked for"),
        ("always", (), "not asked for"),
        ("auto", ("zstd-of-the-future",), "no codec"),
    ],
)
def test_a_part_goes_raw_where_it_must(mode: str, codecs: tuple[str, ...], reason: str) -> None:
    wire = Wire(KINDS["zeros"], 1e6, mode)
    assert wire.packer.pack(wire.outbound, Fetch(1, 0, PART, codecs, 1000), BUFFER) == (b"", BUFFER)
    assert wire.outbound.verdicts == {reason: 1}
    assert wire.outbound.as_dict()["saved_s"] == 0.0


def test_a_faster_link_than_any_codec_is_not_even_sampled() -> None:
    wire = Wire(KINDS["zeros"], 1e6, "auto")
    wire.packer.pack(wire.outbound, Fetch(1, 0, PART, (CODEC,), 5_000_000_000), BUFFER)
    assert wire.now == 0.0 and wire.outbound.verdicts == {"fast link": 1}


def test_probes_cost_a_share_of_the_links_time_not_of_all_time() -> None:
    link = Outbound()
    link.rate = 120_000_000
    assert link.is_probe_due(PART), "the first part may measure a fast link"
    link.went_raw(PART, "probe")
    n_packed = 0
    while not link.is_probe_due(PART):
        link.went_packed(PART, 20_000, "pays", 0.0005)
        n_packed += 1
    assert n_packed * 0.0005 == pytest.approx(PART / link.rate / 0.025, rel=0.01)
