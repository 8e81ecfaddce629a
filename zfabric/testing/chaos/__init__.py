"""Faults on purpose, for tests: a TCP proxy with bad weather, and signals to processes.

Both take a seed and do the same again for it, as far as the world allows: which bytes are flipped
and after which a connection is cut follows from the seed and the bytes alone; when, also from the
machine.
"""

from zfabric.testing.chaos.processes import Fault, ProcessFaults, plan, stopped
from zfabric.testing.chaos.proxy import ChaosProxy
from zfabric.testing.chaos.weather import CALM, DOWN, UP, Weather

__all__ = [
    "CALM",
    "DOWN",
    "UP",
    "ChaosProxy",
    "Fault",
    "ProcessFaults",
    "Weather",
    "plan",
    "stopped",
]
