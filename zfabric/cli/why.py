"""`zfabric why`: what a task waits for."""

from __future__ import annotations

import click

from zfabric.cli.options import joining, say


@click.command(short_help="Say what a task waits for.")
@click.argument("key")
@click.argument("address", envvar="ZFABRIC_ADDRESS")
def why(key: str, address: str) -> None:
    """Say why the tasks called KEY at the fabric at ADDRESS have not ended.

    KEY is the key given to submit, or the name that errors and futures show.

    \b
    zfabric why load-17 tcp://127.0.0.1:8787
    """
    from zfabric.client import Client
    from zfabric.errors import ZFabricError

    with Client(joining(address)) as client:
        address = client.address
        stories = client.why(key)
    if not stories:
        raise ZFabricError(
            f"the broker at {address} has no task called {key!r}: it has ended and been released, "
            "or has another name; a future shows its name as future.key"
        )
    for story in stories:
        say(str(story))
