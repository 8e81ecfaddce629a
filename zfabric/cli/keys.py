"""`zfabric keys`: who may join."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from zfabric.cli.options import say

directory = click.option(
    "--dir",
    "-d",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="ZFABRIC_KEYS",
    help="Where the keys are.  [default: ~/.zfabric/keys]",
)


def _directory(given: Path | None) -> Path:
    from zfabric.keys import default_directory

    return given or default_directory()


@click.group(short_help="Make, list and revoke the keys of a fabric.")
def keys() -> None:
    """Keys say who may join a fabric whose broker listens beyond this host.

    \b
    zfabric keys init                  a broker's key, one for workers, one for clients
    zfabric broker --host 0.0.0.0      prints a line for workers and one for clients
    zfabric keys add alice --role client
    zfabric keys revoke alice          ends her sessions within two seconds
    zfabric keys join worker --address tcp://10.0.0.1:8787 | ssh gpu-1 zfabric worker -

    Whoever holds a key of either role can run code on the workers.
    """


@keys.command()
@directory
def init(directory: Path | None) -> None:
    """Make a broker's key, one for workers and one for clients."""
    from zfabric.keys import KeyRing

    ring = KeyRing.create(_directory(directory))
    for role in ("worker", "client"):
        ring.add(role, role)
    option = f" --keys {ring.directory}" if directory else ""
    say(f"made keys for a broker, workers and clients in {ring.directory}")
    say(f"  start:  zfabric broker --host 0.0.0.0{option}")


@keys.command()
@click.argument("name")
@click.option("--role", type=click.Choice(["client", "worker"]), required=True)
@directory
def add(name: str, role: str, directory: Path | None) -> None:
    """Make one more key, admitted from now on."""
    from zfabric.keys import KeyRing

    ring = KeyRing(_directory(directory))
    ring.add(name, role)
    say(f"{role} key {name} is admitted")
    say(f"  give its owner:  {ring.join_path(name)}  (a running broker writes it; it is a secret)")


@keys.command(name="list")
@directory
def list_(directory: Path | None) -> None:
    """Show the keys that are admitted: name, role, fingerprint. No secrets."""
    from zfabric.keys import KeyRing
    from zfabric.keys.pair import fingerprint

    ring = KeyRing(_directory(directory))
    say(f"{'broker':<24}{'broker':<8}{fingerprint(ring.broker.public)}")
    for member in ring.members():
        say(f"{member.name:<24}{member.role:<8}{fingerprint(member.own.public)}")


@keys.command()
@click.argument("name")
@directory
def revoke(name: str, directory: Path | None) -> None:
    """Admit a key no longer, and end the sessions that it has."""
    from zfabric.keys import KeyRing

    KeyRing(_directory(directory)).revoke(name)
    say(f"{name} is revoked; a running broker ends its sessions within two seconds")


@keys.command()
@click.argument("name")
@click.option("--address", metavar="ADDRESS", help="The broker's.  [default: where it last was]")
@directory
def join(name: str, address: str | None, directory: Path | None) -> None:
    """Print the line to join with, for a pipe: it is a secret."""
    from zfabric.errors import ConfigError
    from zfabric.keys import KeyRing
    from zfabric.keys.join import read_file

    ring = KeyRing(_directory(directory))
    if address is None:
        path = ring.join_path(name)
        ring.member(name)
        if not path.exists():
            raise ConfigError("no broker has used these keys yet; say --address tcp://HOST:PORT")
        address = read_file(path)[0]
    if sys.stdout.isatty():
        click.echo("this line is a secret: pass it on by a pipe or a file", err=True)
    say(ring.join(name, address).token())
