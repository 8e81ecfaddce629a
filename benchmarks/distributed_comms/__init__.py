"""zmq:// against tcp:// inside the same dask.distributed."""
