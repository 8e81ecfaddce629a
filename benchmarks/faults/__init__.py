"""The same faults on zfabric and on its peers: what is lost, wrong, run twice or hung.

tasks.py        what the tasks do; each begin and end leaves a line in an audit file
audit.py        that file, read
systems.py      what a system must offer to be hurt, and the processes it is made of
zfabric_system.py, distributed_system.py, parsl_system.py
cases.py        the faults, each a function of a system
work.py         tasks under way, and the account of what became of them
garbage.py      bytes that nobody should send
cell.py         one fault on one system, in a process of its own, within bounds
page.py         the tables
command.py      the command line
"""
