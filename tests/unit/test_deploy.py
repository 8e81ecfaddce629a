"""What operators copy is well formed and uses the command line as it is."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from zfabric.cli.group import cli

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def check_command(words: list[str]) -> None:
    """Fails unless the CLI takes these words; runs nothing."""
    command = cli.commands[words[0]]
    try:
        command.make_context(words[0], list(words[1:]))
    except click.ClickException as error:
        pytest.fail(f"zfabric {shlex.join(words)}: {error.format_message()}")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return content


def test_compose_has_only_keys_of_the_compose_specification(compose: dict[str, Any]) -> None:
    assert set(compose) <= {"name", "services", "networks", "volumes", "secrets", "configs"}
    known = set(
        "build image command networks ports init restart stop_grace_period healthcheck depends_on "
        "security_opt cap_drop entrypoint volumes".split()
    )
    for name, service in compose["services"].items():
        assert set(service) <= known, name
        assert set(service["networks"]) <= set(compose["networks"])
        for other, condition in service.get("depends_on", {}).items():
            assert other in compose["services"]
            is_lasting = "healthcheck" in compose["services"][other]
            state = "healthy" if is_lasting else "completed_successfully"
            assert condition == {"condition": f"service_{state}"}
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]


def test_compose_commands_are_ours(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        if "entrypoint" in service:
            continue  # a script of shell; tests/e2e/test_deploy.py runs it
        check_command(service["command"])
        if "healthcheck" in service:
            marker, program, *words = service["healthcheck"]["test"]
            assert (marker, program) == ("CMD", "zfabric")
            check_command(words)


def test_compose_publishes_on_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_builds_from_the_repository(compose: dict[str, Any]) -> None:
    build = compose["services"]["keys"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert (context / build["dockerfile"]).is_file()


def test_the_image_copies_what_exists_and_is_not_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    known = {"FROM", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in steps} <= known
    for word, rest in steps:
        if word == "COPY":
            assert all((DEPLOY.parent / source).exists() for source in rest.split()[:-1])
    assert [rest for word, rest in steps if word == "USER"][-1] == "zfabric"
    assert steps[-2] == ["ENTRYPOINT", '["zfabric"]']


def settings_of(unit: Path) -> dict[str, list[str]]:
    """Key to values, over all sections of a unit."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_commands_are_ours(unit: Path) -> None:
    settings = settings_of(unit)
    (start,) = settings["ExecStart"]
    for assignment in settings.get("Environment", []):
        name, _, value = assignment.partition("=")
        start = start.replace(f"${{{name}}}", value).replace(f"${name}", value)
    program, *words = shlex.split(start.replace("%H", "host").replace("%i", "1"))
    assert program.endswith("/bin/zfabric")
    check_command(words)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_verify(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text().replace("/opt/zfabric/bin/zfabric", sys.executable)
    copy = tmp_path / unit.name.replace("@.", "@1.")
    copy.write_text(text.replace("User=zfabric", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    complaints = [line for line in done.stderr.splitlines() if "zfabric-" in line]
    assert complaints == []


def test_the_batch_script_parses() -> None:
    script = DEPLOY / "slurm" / "zfabric.sbatch"
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_batch_script_has_its_options_before_the_first_command() -> None:
    lines = (DEPLOY / "slurm" / "zfabric.sbatch").read_text().splitlines()
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) == 5
    assert max(options) < first_command


def test_the_readme_names_every_file() -> None:
    readme = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert f"`{path.relative_to(DEPLOY)}`" in readme


def test_compose_workers_do_not_see_the_brokers_keys(compose: dict[str, Any]) -> None:
    assert compose["services"]["worker"]["volumes"] == ["join:/home/zfabric/join:ro"]
    assert not [w for s in compose["services"].values() for w in s["command"] if "insecure" in w]
