"""What a task costs, on zfabric and on its peers, in one run.

functions.py   what the tasks do: nothing, or nearly
peers.py       each peer behind one small interface, used through its own API
workloads.py   map, latency, chain, tree, small results, each timed
startup.py     a fresh process until its first result; the time of an import
memory.py      bytes that a broker needs per finished task that somebody still holds
zero_worker.py a worker that acknowledges rows without running them
targets.py     what is to be reached, as ratios between figures of one run
command.py     the command line
"""
