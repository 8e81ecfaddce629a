"""Keys: pairs, the files they live in, the directory of those that a broker admits, join lines.

Nothing here opens a socket; `zfabric.transport.curve` puts keys on sockets.
"""

from zfabric.keys.join import Join, resolve
from zfabric.keys.pair import KeyPair
from zfabric.keys.ring import KeyRing, Member, default_directory

__all__ = ["Join", "KeyPair", "KeyRing", "Member", "default_directory", "resolve"]
