"""What operators copy, run for real: the Slurm script with a stand-in for srun, compose without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zfabric import Client

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose.yaml"
SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "zfabric.sbatch"

PROGRAM = """
import os, zfabric
with zfabric.Client() as client:
    client.wait_for_workers(1, timeout=30)
    print(os.environ["ZFABRIC_ADDRESS"].endswith("/keys/client.join"))
    print(sum(client.gather(client.map(abs, range(-10, 0)))))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with `zfabric`, and an `srun` that runs its command here, once."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "zfabric").write_text(f'#!/bin/sh\nexec {sys.executable} -m zfabric "$@"\n')
    (tools / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "BROKER_HOST": "127.0.0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )


@pytest.mark.usefixtures("leaves_nothing")
def test_a_job_has_its_fabric(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, sys.executable, "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["True", "55"]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("zfabric-*"))


def test_the_job_ends_as_its_program_does(environment: dict[str, str]) -> None:
    assert run(environment, sys.executable, "-c", "raise SystemExit(3)").returncode == 3


def test_a_job_without_a_program_says_how(environment: dict[str, str]) -> None:
    done = run(environment)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.usefixtures("leaves_nothing")
def test_the_commands_of_the_compose_file_make_a_fabric(
    environment: dict[str, str], tmp_path: Path, free_port: int
) -> None:
    """In one folder in place of containers, on a port of this host."""
    text = COMPOSE.read_text()
    for address in ("tcp://broker:8787", "tcp://127.0.0.1:8787", "tcp://0.0.0.0:8787"):
        text = text.replace(address, f"tcp://127.0.0.1:{free_port}")
    services = yaml.safe_load(text)["services"]
    for folder in ("state", "join"):
        (tmp_path / folder).mkdir(mode=0o700)
    make_keys = [*services["keys"]["entrypoint"], *services["keys"]["command"]]
    for _ in range(2):  # and when the fabric is started again
        subprocess.run(make_keys, cwd=tmp_path, env=environment, check=True, timeout=60)
    children = [
        subprocess.Popen(["zfabric", *services[name]["command"]], cwd=tmp_path, env=environment)
        for name in ("broker", "worker")
    ]
    try:
        with Client(str(tmp_path / "state" / "client.join")) as client:
            client.wait_for_workers(1, timeout=60)
            assert client.submit(pow, 2, 10).result(60) == 1024
        check = ["zfabric", *services["broker"]["healthcheck"]["test"][2:]]
        subprocess.run(check, cwd=tmp_path, env=environment, check=True, timeout=60)
    finally:
        for child in reversed(children):
            child.terminate()
            child.wait(30)
