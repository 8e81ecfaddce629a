"""Dask's collections on a fabric: arrays, dataframes, bags, delayed calls, xarray objects.

    graphs.py     what Dask hands over, as one table of nodes, only what is wanted of it
    blocks.py     many tiny tasks to few rows
    habits.py     which small graphs have shown to be faster as one row
    sending.py    rows out of blocks
    stores.py     what would be stored into copies, refused
    running.py    what a worker does with such a row
    held.py       persisted keys: what stands in a collection for data that the workers have
    scheduler.py  the three verbs: get, compute, persist
    default.py    being what `x.compute()` uses without being named

Nothing here is imported before it is used, and Dask not before that.
"""
