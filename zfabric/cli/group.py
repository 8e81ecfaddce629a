"""The group of all commands, and how each of them ends."""

from __future__ import annotations

import sys

import click

import zfabric
from zfabric.cli.broker import broker
from zfabric.cli.demo import demo
from zfabric.cli.keys import keys
from zfabric.cli.links import links
from zfabric.cli.replay import replay
from zfabric.cli.runs import runs
from zfabric.cli.status import status
from zfabric.cli.why import why
from zfabric.cli.worker import worker
from zfabric.errors import InternalError, ZFabricError

HELP = """A compute fabric for Python on ZeroMQ.

\b
On one machine nothing has to be started:
    with zfabric.Client() as c:
        print(c.submit(pow, 2, 10).result())

\b
On several, or in three terminals:
    zfabric broker                              prints its address
    zfabric worker tcp://127.0.0.1:8787 -n 4    on each machine
    zfabric demo --address tcp://127.0.0.1:8787

\b
    zfabric status tcp://127.0.0.1:8787         who is there, what runs
    zfabric why KEY tcp://127.0.0.1:8787        what a task waits for
    zfabric links tcp://127.0.0.1:8787          how fast values move
    zfabric demo                                all of it at once, here

Every setting is also a variable: ZFABRIC_ADDRESS for clients, ZFABRIC_DEAD_S=60 and so on.
"""


@click.group(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(zfabric.__version__, "-V", "--version", message="zfabric %(version)s")
def cli() -> None:
    pass


for command in (broker, worker, demo, status, links, why, runs, replay, keys):
    cli.add_command(command)


def run() -> None:
    """Runs the command line. Our own errors are one text without a traceback, and exit status 1;
    a bug of ours keeps its traceback; Ctrl-C is status 130 and silent."""
    try:
        sys.exit(cli(standalone_mode=False, prog_name="zfabric"))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except InternalError:
        raise
    except ZFabricError as error:
        click.echo(f"zfabric: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output went away (`zfabric status ... | head`): nothing is wrong, but
        # the interpreter's own last flush would complain.
        sys.stdout = None
        sys.exit(141)
