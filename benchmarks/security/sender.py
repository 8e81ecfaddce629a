"""`python -m benchmarks.security.sender`: sends zeros over some connections; told how on stdin."""

from __future__ import annotations

import json
import sys

from zfabric.transport import Poller, connect
from zfabric.transport.curve import ClientKeys


def main() -> None:
    told = json.loads(sys.stdin.readline())
    keys = told["keys"] and ClientKeys(*(bytes.fromhex(key) for key in told["keys"]))
    chunk = memoryview(bytes(told["chunk"]))
    more = {"security": keys} if keys else {"seal": told["seal"]}
    channels = [connect(told["address"], **more) for _ in range(told["connections"])]
    poller = Poller()
    for channel in channels:
        poller.add(channel)
    left = dict.fromkeys(channels, told["nbytes"] // told["chunk"] // len(channels))
    while any(left.values()):
        stuck = True
        for channel in channels:
            if left[channel] and channel.send([b"x", chunk]):
                left[channel] -= 1
                stuck = False
        if stuck:
            poller.wait(0.001)
            for channel in channels:
                channel.recv()
    sys.stdin.readline()
    for channel in channels:
        channel.close()


if __name__ == "__main__":
    main()
