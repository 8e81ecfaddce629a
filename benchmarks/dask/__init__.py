"""Dask's collections on zfabric, on dask.distributed and on Dask's own schedulers, in one run.

workloads.py   graphs of many small tasks, and of large chunks
peers.py       what computes them, each behind one small interface
command.py     the command line
"""
