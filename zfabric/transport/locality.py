"""Whether an address leads to this very host."""

from __future__ import annotations

import socket
from functools import lru_cache

_ON_ONE_HOST = frozenset({"ipc", "inproc"})


@lru_cache(256)
def is_same_host(address: str) -> bool:
    """Whether what listens at `address` is on this host, as far as that is known without asking
    anybody: by the scheme, or because the host part is an address of ours. Names other than our
    own and localhost count as another host."""
    scheme, _, rest = address.partition("://")
    if scheme in _ON_ONE_HOST:
        return True
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host in ("localhost", socket.gethostname()):
        return True
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)  # never look a name up: that may take seconds
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))  # only our own addresses can be bound to
    except OSError:
        return False
    return True
