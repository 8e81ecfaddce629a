"""`zfabric broker`: the process that everybody dials."""

from __future__ import annotations

from pathlib import Path

import click

from zfabric.cli.options import log_level, say, start_logging

DEFAULT_ADDRESS = "tcp://127.0.0.1:8787"


@click.command(short_help="Start a broker.")
@click.option(
    "--listen",
    "-l",
    "address",
    metavar="ADDRESS",
    default=DEFAULT_ADDRESS,
    show_default=True,
    help="Where to listen; port 0 takes a free one.",
)
@click.option("--host", help="Short for --listen tcp://HOST:8787; 0.0.0.0 is all interfaces.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="With --host: where; 0 takes a free one."
)
@click.option(
    "--keys",
    metavar="DIR",
    help="Admit these keys only.  [beyond this host: $ZFABRIC_KEYS or ~/.zfabric/keys]",
)
@click.option("--strict", is_flag=True, help="End when the port is in use; do not try the next.")
@click.option(
    "--connection-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the address here once it listens, as JSON.",
)
@click.option(
    "--insecure", is_flag=True, help="Listen beyond this host without keys: anybody may run code."
)
@click.option(
    "--record",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep all events in a new file, for `zfabric replay FILE`. It holds arguments too.",
)
@click.option(
    "--journal",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write down what is needed to go on after a restart, and go on from there.",
)
@log_level
def broker(
    address: str,
    host: str | None,
    port: int | None,
    keys: str | None,
    strict: bool,
    connection_file: Path | None,
    insecure: bool,
    record: Path | None,
    journal: Path | None,
    log_level: str,
) -> None:
    """Start a broker; Ctrl-C or SIGTERM ends it.

    \b
    zfabric broker
    zfabric broker --listen tcp://127.0.0.1:0 --connection-file broker.json
    zfabric broker --listen ipc:///run/user/1000/fabric
    zfabric broker --host 0.0.0.0        after: zfabric keys init
    """
    from zfabric.runtime.broker import serve

    if (host or port is not None) and address != DEFAULT_ADDRESS:
        raise click.UsageError("--listen says host and port already")
    if host or port is not None:
        host = f"[{host}]" if host and ":" in host and host[0] != "[" else host
        address = f"tcp://{host or '127.0.0.1'}:{8787 if port is None else port}"
    start_logging(log_level)
    raise SystemExit(
        serve(
            address,
            strict=strict,
            connection_file=connection_file,
            insecure=insecure,
            keys=keys,
            record=record,
            journal=journal,
            announce=say,
        )
    )
