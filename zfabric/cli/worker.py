"""`zfabric worker`: one supervisor and its slots."""

from __future__ import annotations

import click

from zfabric.cli.options import Resources, Size, joining, log_level, merged, start_logging


@click.command(short_help="Start a worker for a broker.")
@click.argument("address", envvar="ZFABRIC_ADDRESS")
@click.option(
    "--slots",
    "-n",
    type=click.IntRange(min=1),
    help="Tasks that run at a time.  [default: all cores]",
)
@click.option("--threads", is_flag=True, help="Thread slots in place of processes.")
@click.option(
    "--slot-memory",
    metavar="BYTES",
    type=Size(),
    help="What a slot may take; a task above it is killed: 500M, 2G.",
)
@click.option(
    "--memory-limit",
    metavar="BYTES",
    type=Size(),
    help="Values it holds in memory, the rest on disk: 8G.  [default: 0.6 of the host's]",
)
@click.option("--name", help="Its name for people and for workers=.  [default: host and pid]")
@click.option(
    "--resources",
    "-r",
    type=Resources(),
    multiple=True,
    help="What it has for tasks that ask for it: -r GPU=2 -r disk=1.",
)
@click.option(
    "--data-address",
    metavar="ADDRESS",
    help="Where others fetch large values from it.  [default: a free port]",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Let --data-address be one that other machines reach.",
)
@log_level
def worker(
    address: str,
    slots: int | None,
    threads: bool,
    slot_memory: int | None,
    memory_limit: int | None,
    name: str | None,
    resources: tuple[dict[str, float], ...],
    data_address: str | None,
    insecure: bool,
    log_level: str,
) -> None:
    """Start a worker that serves the broker at ADDRESS; Ctrl-C or SIGTERM ends it.

    ADDRESS is the broker's, or the path of a join file, or - to read a join line from stdin.

    \b
    zfabric worker tcp://127.0.0.1:8787
    zfabric worker tcp://10.0.0.1:8787 -n 8 --resources GPU=2 --name gpu-1
    zfabric worker ~/.zfabric/keys/worker.join
    """
    from zfabric.runtime.worker import serve

    start_logging(log_level)
    raise SystemExit(
        serve(
            joining(address),
            slots=slots,
            kind="thread" if threads else "process",
            name=name,
            resources=merged(resources),
            data_address=data_address,
            insecure=insecure,
            memory_limit=slot_memory or 0,
            store_limit=memory_limit or 0,
        )
    )
