"""Messages ⇄ frames.

Frame 0 is the header, frame 1 the body, both positional msgpack; frames 2 and up carry bulk
bytes untouched. `docs/protocol.md` shows the layouts.
"""

from zfabric.wire.coding import Body, decode, encode, encode_body, encode_header, is_sequenced
from zfabric.wire.header import MAX_FRAMES, PROTOCOL, Header, header_end, header_start

__all__ = [
    "MAX_FRAMES",
    "PROTOCOL",
    "Body",
    "Header",
    "decode",
    "encode",
    "encode_body",
    "encode_header",
    "header_end",
    "header_start",
    "is_sequenced",
]
