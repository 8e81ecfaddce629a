"""Parts of values on their way out: compressed where the link makes that pay.

The sender of a part decides, by the rate that its receiver sees (see `core.links`), by a small
sample of the bytes (`codec.sampler`), and by how fast the codec was with such bytes before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, Protocol

from zfabric.clock import now_s
from zfabric.codec import compress
from zfabric.codec.sampler import SamplerSettings, flat_bytes, judge, take_sample
from zfabric.config import DEFAULTS, Settings
from zfabric.core.links import CodecRecord, Outbound
from zfabric.messages import Fetch

Buffer = bytes | memoryview

ITEM_SIZES = (8, 4, 2, 1)
"""A store knows bytes, not dtypes. The one of these that compresses a sample best is taken; on
equal terms the first."""

SAMPLING = SamplerSettings(window=8_000)
ITEM_SIZE_SAMPLING = SamplerSettings(window=2_000)
"""Together they never look at more than 50 kB of a part."""

MAX_KNOWN = 256
"""Values whose item size is remembered."""

CHANGED = 0.1
"""A ratio that differs so much from the last part's asks for the item size again."""

REGULAR = 0.1
REGULAR_SAMPLING = replace(SAMPLING, compress_rate=4e9, decompress_rate=5e9)
"""What the codec is expected to reach on bytes that compress below that ratio, until it is
measured: a guess too low would never be put right."""

FASTEST = 3e9
"""Bytes/s of a link on which even zeros would rather go raw: nothing is sampled."""


class Codec(Protocol):
    """What `codec.compress` offers; a test brings a model of it."""

    def codecs(self) -> tuple[str, ...]:
        """See compress.codecs."""

    def compressed_size(self, sample: Any, itemsize: int) -> int:
        """See compress.compressed_size."""

    def compress(self, buffer: Any, itemsize: int) -> compress.Compressed | None:
        """See compress.compress."""


class Packer:
    """Decides about the parts that one end sends, and compresses them.

    clock: tells seconds; a codec's speed is measured here, nowhere else.
    """

    def __init__(
        self,
        settings: Settings = DEFAULTS,
        *,
        codec: Codec = compress,
        clock: Callable[[], float] = now_s,
        rng: Random | None = None,
    ) -> None:
        self._mode = settings.compression
        self._codec = codec
        self._clock = clock
        self._rng = rng or Random()
        self._record = CodecRecord()
        self._known: OrderedDict[int, tuple[int, float]] = OrderedDict()
        """By value: item size and ratio of the last part that was sampled."""

    def pack(self, link: Outbound, request: Fetch, data: Buffer) -> tuple[bytes, Buffer]:
        """(packing, bytes to send) for a part that was asked for; (b"", data) is raw."""
        link.rate = request.rate
        nbytes = len(data)
        if self._mode == "off" or not request.codecs:
            link.went_raw(nbytes, "off" if self._mode == "off" else "not asked for")
        elif compress.CODEC not in request.codecs or not self._codec.codecs():
            link.went_raw(nbytes, "no codec")
        else:
            began = self._clock()  # not before: asking for codecs once imports one
            if self._mode != "always" or not nbytes:
                return self._judged(link, request.id, data, began)
            itemsize, _ = self._item_size(request.id, data, 2.0)
            return self._compressed(link, request.id, data, itemsize, 1.0, "always", began)
        return b"", data

    def _judged(self, link: Outbound, id_: int, data: Buffer, began: float) -> tuple[bytes, Buffer]:
        nbytes, rate = len(data), link.assumed_rate
        if rate > FASTEST:
            link.went_raw(nbytes, "fast link")
            return b"", data
        known = self._known.get(id_)
        itemsize, ratio = known or self._item_size(id_, data, 2.0)
        settings = REGULAR_SAMPLING if ratio < REGULAR else SAMPLING
        seen = self._record.rate(itemsize, nbytes, ratio)
        if seen:
            settings = replace(settings, compress_rate=seen)
        verdict = judge(
            data, itemsize, self._rng, self._codec.compressed_size, settings, rate, link.margin
        )
        if known and verdict.sampled and abs(verdict.ratio - ratio) > CHANGED:
            itemsize, _ = self._item_size(id_, data, verdict.ratio)
        reason = verdict.reason
        if verdict.compress and link.is_probe_due(nbytes):
            reason = "probe"
        if reason != "pays":
            link.went_raw(nbytes, reason, self._clock() - began)
            return b"", data
        return self._compressed(link, id_, data, itemsize, verdict.ratio, reason, began)

    def _compressed(
        self,
        link: Outbound,
        id_: int,
        data: Buffer,
        itemsize: int,
        ratio: float,
        reason: str,
        began: float,
    ) -> tuple[bytes, Buffer]:
        start = self._clock()
        packed = self._codec.compress(data, itemsize)
        now = self._clock()
        self._record.add(itemsize, len(data), ratio, now - start)
        if packed is None:
            link.went_raw(len(data), "did not shrink", now - began)
            return b"", data
        link.went_packed(len(data), len(packed.data), reason, now - began)
        return packed.header, packed.data

    def _item_size(self, id_: int, data: Buffer, default: float) -> tuple[int, float]:
        """The item size with which a sample of this part compresses best, and the ratio."""
        flat = flat_bytes(data)
        sample = take_sample(flat, max(ITEM_SIZES), self._rng, ITEM_SIZE_SAMPLING)
        best, ratio = 1, default
        for itemsize in ITEM_SIZES:
            found = self._codec.compressed_size(sample, itemsize) / max(len(sample), 1)
            if found < ratio:
                best, ratio = itemsize, found
        self._known[id_] = best, ratio
        self._known.move_to_end(id_)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return best, ratio
