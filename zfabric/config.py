"""Settings: one frozen tree, with default, unit and reason beside each field.

Read once at the top (command line or `Client()`) and passed down. Defaults < `ZFABRIC_...`
environment < arguments: `Settings.load(inline_limit=...)`. `ZFABRIC_DEAD_S=60` sets `dead_s`.
An unknown name is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from zfabric.errors import ConfigError

KiB = 1024
MiB = 1024 * KiB

ENVIRONMENT_PREFIX = "ZFABRIC_"

LOG_LEVELS = ("", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

OTHER_VARIABLES = frozenset({"ZFABRIC_ADDRESS", "ZFABRIC_DEBUG", "ZFABRIC_KEYS"})
"""Variables with our prefix that are not settings."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a broker, a worker and a client have to agree on, or may be tuned."""

    inline_limit: int = 4 * KiB
    """Bytes. Results up to this ride along in rows and outlive the worker that made them."""

    argument_limit: int = 64 * KiB
    """Bytes. A call's arguments above this become a value of their own, so that the control
    plane carries no bulk."""

    chunk: int = 2 * MiB
    """Bytes of a value per message: 1 to 16 MiB all reach the speed of the link; small chunks
    keep a ZeroMQ heartbeat from being cut off by one big frame."""

    compression: str = "auto"
    """Of values that cross a network: "auto" where the measured link makes it pay, "off", or
    "always", which is there for comparison."""

    memory_limit: int = 0
    """Bytes of values that a worker holds in memory at most; 0: six tenths of what the host or the
    container has. From 0.6 of it on values go to disk, from 0.8 on new tasks wait for that."""

    spill_directory: str = ""
    """Where those on disk lie, in files without a name; "": the system's directory for temporary
    files ($TMPDIR)."""

    shared_memory: str = "on"
    """Whether values between processes of one host are handed over as memory, or "off"."""

    echo: str = "on"
    """Whether what tasks write to stdout and stderr is also written to those of their worker, or
    "off". Clients get it in either case: `future.logs()`."""

    log_level: str = ""
    """In slots that are processes: the level, such as "INFO", from which on records of tasks'
    `logging` are written to stderr. "": as Python has it, from WARNING on and without names."""

    batch_rows: int = 4096
    """Rows per message at most, so that the other end starts before we finish."""

    batch_bytes: int = 1 * MiB
    """Payload bytes per message at most, well below the largest frame that a listener takes."""

    max_frame: int = 4 * MiB + 64 * KiB
    """Bytes of the largest frame that a listener takes: one chunk of at most 4 MiB, and a head."""

    window: int = 256
    """Messages that may be on their way without an ack: below ZeroMQ's high-water mark of 1000,
    which therefore is only a fuse."""

    window_bytes: int = 16 * MiB
    """The same in bytes. What else is due waits as rows, which refer to what is kept anyway."""

    relay_bytes: int = 64 * MiB
    """Bytes from one worker's store to another peer that wait at the broker for a link at most."""

    session_bytes: int = 4096 * MiB
    """Bytes that one session's tasks, with their arguments and small values, take at the broker at
    most. Rows beyond that end as QuotaExceeded."""

    key_bytes: int = 0
    """The same for all sessions of one key together; 0: no limit beyond the next one."""

    broker_bytes: int = 0
    """The same for all sessions together; 0: six tenths of what the host or the container has."""

    beat_s: float = 1.0
    """Seconds between two beats of a peer."""

    suspect_s: float = 5.0
    """Seconds of silence after which a worker gets no new rows."""

    dead_s: float = 30.0
    """Seconds of silence after which a session is over."""

    grace_s: float = 0.5
    """Seconds that a peer whose connection broke has to come back before it is taken for dead.
    A redial takes 0.2 s; a killed worker should be noticed in less than a second."""

    lease_s: float = 60.0
    """Seconds that a user's client that was cut off, or is silent, has to come back before its
    tasks are released."""

    lease_bytes: int = 64 * MiB
    """Bytes of messages that are kept for a peer which does not read; beyond that it is given up.
    Results are not among them: they wait in the table."""

    settle_s: float = 3.0
    """Seconds that a restarted broker waits for the workers it had, before their rows and values
    are taken for lost."""

    connect_timeout_s: float = 5.0
    """Seconds until a first contact without an answer is an error."""

    max_deaths: int = 3
    """Processes that a task may kill before it ends as KilledTask."""

    retry_s: float = 0.1
    """Seconds at most before a failed task's first retry; each further one waits twice as long."""

    max_retry_s: float = 30.0
    """Seconds at most before any retry."""

    lookahead_s: float = 0.02
    """Seconds of work that a worker wants to hold ahead of need. A fabric round trip takes less
    than a millisecond, so 20 ms hides it even when the machine stalls."""

    max_rows: int = 4096
    """Rows that a worker holds at most, whatever their duration."""

    sessions_per_key: int = 4096
    """Sessions that may be open with one key: all workers that share a join line count."""
    stall_s: float = 60.0
    """Seconds without any progress, while there is work and nobody runs a row, after which the
    broker reports itself: see core.watchdog."""

    no_worker_warning_s: float = 3.0
    """Seconds after which a waiting client says that there are no workers."""

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
        """Defaults, overlaid by the environment, overlaid by arguments that are not None."""
        values: dict[str, Any] = {}
        known = {f.name: type(f.default) for f in fields(cls)}
        for name, text in (os.environ if environ is None else environ).items():
            if name.startswith(ENVIRONMENT_PREFIX) and name not in OTHER_VARIABLES:
                field_name = name[len(ENVIRONMENT_PREFIX) :].lower()
                values[field_name] = _parsed(name, text, known)
        for name, value in arguments.items():
            if name not in known:
                raise ConfigError(_unknown(name, known))
            if value is not None:
                values[name] = value
        settings = replace(cls(), **values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, str):
                continue
            number = not isinstance(value, bool) and isinstance(value, (int, float))
            if f.name in ("memory_limit", "key_bytes", "broker_bytes") and value == 0:
                continue
            if not number or not 0 < value < math.inf:
                raise ConfigError(f"{f.name} must be a number above 0, not {value!r}")
            if isinstance(f.default, int) and not isinstance(value, int):
                raise ConfigError(f"{f.name} must be a whole number, not {value!r}")
        if self.compression not in ("auto", "off", "always"):
            raise ConfigError(f"compression must be auto, off or always, not {self.compression!r}")
        if self.shared_memory not in ("on", "off"):
            raise ConfigError(f"shared_memory must be on or off, not {self.shared_memory!r}")
        if self.echo not in ("on", "off"):
            raise ConfigError(f"echo must be on or off, not {self.echo!r}")
        if self.log_level not in LOG_LEVELS:
            known = ", ".join(level for level in LOG_LEVELS if level)
            raise ConfigError(f"log_level must be one of {known}, not {self.log_level!r}")
        if self.inline_limit > self.batch_bytes:
            raise ConfigError(
                f"inline_limit ({self.inline_limit}) must not be above batch_bytes"
                f" ({self.batch_bytes})"
            )
        if self.chunk + 64 * KiB > self.max_frame:
            raise ConfigError(
                f"chunk ({self.chunk}) must be at least 64 KiB below max_frame ({self.max_frame})"
            )
        if not self.beat_s < self.suspect_s < self.dead_s:
            raise ConfigError("beat_s < suspect_s < dead_s must hold")


def _parsed(name: str, text: str, known: Mapping[str, type]) -> Any:
    field_name = name[len(ENVIRONMENT_PREFIX) :].lower()
    if field_name not in known:
        raise ConfigError(_unknown(name, [ENVIRONMENT_PREFIX + k.upper() for k in known]))
    try:
        return known[field_name](text)
    except ValueError:
        raise ConfigError(
            f"{name}={text!r} is not {'an integer' if known[field_name] is int else 'a number'}"
        ) from None


def _unknown(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
    return f"unknown setting {name}{hint}"


DEFAULTS = Settings()
