"""Bytes that nobody should send, at the parser, the broker's machine and a live broker's socket.

`python -m zfabric.testing.fuzz -n 1000000 --seed 0`
"""
