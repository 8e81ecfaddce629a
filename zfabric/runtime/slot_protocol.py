"""What a supervisor and its slot share: frames on a socketpair, a page, and a token counter.

Frames are `length u32, type u8, body`. Rows are run in the order in which they were sent, and
results come back in that order. They name their rows all the same, so that both ends notice if
they ever disagree.

Before it starts a row the slot takes one token from an eventfd semaphore; the supervisor posts
one per row that it sends. So when the supervisor takes k tokens away itself, the last k rows
that it sent are its own again, with certainty, even while the slot is deep in C code. The slot
notices when it finds no token for the next row; it then drops rows until it reads RESET, which
it acknowledges. Until the acknowledgement nothing new is sent to it.

The page (shared memory) holds a few 64-bit words and the batch of results that has not been
sent yet. So a result that was finished before a long row began, or before the process died, can
be read by the supervisor without any help from the slot.
"""

from __future__ import annotations

from struct import Struct

FRAME = Struct("<IB")
"""Length of the body, type."""

# Supervisor to slot.
ROWS = 1
"""marshal of a list of rows; see core.supervisor_effects.SendRows. A stored value is
(sizes, bytes); (sizes, None, offset) with its file's descriptor sent ahead, for this row alone; or
(sizes, id, is_new, offset): shared, and kept mapped under that id, its file's descriptor sent ahead
when new."""
FUNCTIONS = 2
"""marshal of a list of (function id, name, blob)."""
RESET = 3
FORGET = 4
"""marshal of a list of function ids."""
CONFIG = 5
"""marshal of {"address": str, "worker": str, "inline_limit": int, "log_level": str}."""
DESCRIPTORS = 6
"""One byte; it brings descriptors for the next frame."""
LARGE = 7
"""u8: the type of the frame that lies in the next descriptor's file."""
UNMAP = 8
"""marshal of a list of value ids whose mappings are kept no longer."""

# Slot to supervisor.
READY = 16
RESULTS = 17
"""first row u64, nanoseconds spent u64, then records."""
RESET_DONE = 18
BLOCKED = 19
UNBLOCKED = 20
FILE = 21
"""As RESULTS, with one record, STORED; its bytes are in the descriptor that comes with it."""
SLAB = 22
"""Empty; it brings the descriptor of a slab, ahead of the first record that names it."""

HEAD = Struct("<QQ")
RECORD = Struct("<BIQ")
"""Status, length of the payload, which follows, and the row's task id. A STORED record's payload
is marshal of (sizes, bytes, None for a FILE's, or (slab, offset)). Slabs are counted from 1; a
record that names one is the last to need those before it."""

RESULTS_HEAD = Struct("<IBQQ")
"""FRAME and HEAD at once."""

# The page: indices of 64-bit words.
CLAIMED = 0
"""Rows that the slot has begun, since it was started."""
STARTED_NS = 1
"""When the last of them began, by CLOCK_MONOTONIC."""
FINISHED = 2
"""Rows whose record is complete, in the batch below or sent."""
BATCH_FIRST = 3
"""Rows finished before the first one of the batch below."""

HEARD = 4
"""Bytes that the supervisor has read of the slot's output; its word, as the next one is."""
READING = 5
"""1 while the supervisor reads of it, so that the bytes on their way are in no count; else 0."""
WROTE = 6
"""Bytes of output that the slot knew of when it last reported rows."""

N_WORDS = 8
BATCH = N_WORDS * 8 + RESULTS_HEAD.size
"""Where the batch's records begin; its head is written before them when it is sent."""
PAGE_NBYTES = 1 << 17
BATCH_END = PAGE_NBYTES

FLUSH_NS = 1_000_000
"""A slot reports after a row that ends later than this after the batch's first one began."""

MAX_BODY = 1 << 20
"""Bytes of a frame's body; more goes through a file."""

IN_BAND = 1 << 16
"""Bytes of a value that still travels over the socket."""
