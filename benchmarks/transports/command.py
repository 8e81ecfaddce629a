"""`python -m benchmarks transports`: runs the pairs, prints a table, writes JSON, plots, a page."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.measure import environment
from benchmarks.transports import page
from benchmarks.transports.pair import Plan
from benchmarks.transports.ways import WAYS, missing, mpiexec

PACKAGES = ("pyzmq", "tornado", "distributed", "mpi4py", "numpy")
ROOT = Path(__file__).resolve().parents[2]

SIZES = (64, 1024, 16 * 1024, 256 * 1024, 2 * 2**20, 16 * 2**20, 256 * 2**20, 2**30)
QUICK = (64, 16 * 1024, 2 * 2**20, 64 * 2**20)
BUSY = (64, 16 * 1024, 2 * 2**20, 16 * 2**20)

Sample = dict[str, Any]


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    names = options.ways.split(",") if options.ways else list(WAYS)
    if unknown := [name for name in names if name not in WAYS]:
        print(f"no way {unknown[0]!r}; known: {', '.join(WAYS)}", file=sys.stderr)
        return 2
    samples: list[Sample] = []
    failures = []
    seconds = 0.08 if options.quick else 0.5
    plans = [
        Plan(QUICK, seconds, False, ("random",)) if options.quick else Plan(SIZES, seconds, False),
        Plan(BUSY[1:3] if options.quick else BUSY, seconds, True, ("random",)),
    ]
    try:
        for name in names:
            if needs := missing(name):
                print(f"left out: {name} (needs {needs})", file=sys.stderr)
                continue
            for plan in plans:
                report.note(f"{name}{', both ends busy' if plan.busy else ''}")
                try:
                    samples += [{"way": name, **each} for each in run(name, plan, options.timeout)]
                except Exception as error:
                    failures.append(f"FAILED {name}, busy={plan.busy}: {error}")
    except KeyboardInterrupt:
        failures.append("CUT OFF here; this is what had been measured until then")
    report.note("")
    machine = environment(PACKAGES)
    text = table(samples)
    print(report.header(machine) + "\n\n" + text)
    print("\n".join(failures), end="\n" if failures else "")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": machine, "samples": samples, "failures": failures}
        (options.out / "transports.json").write_text(json.dumps(content, indent=1) + "\n")
        page.write(options.out, machine, samples, text)
        print(f"\nwritten to {options.out}: transports.html, transports.json, *.png")
    return 1 if failures else 0


def run(name: str, plan: Plan, timeout_s: float) -> list[Sample]:
    """One pair of processes. Raises OSError with what it said when it fails."""
    argv = [sys.executable, "-m", "benchmarks.transports.pair", name, json.dumps(plan._asdict())]
    if name == "mpi":
        argv = [mpiexec(), "--oversubscribe", "-n", "2", *argv]
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # Open MPI refuses root, and two ranks that spin starve each other on few cores.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    process = subprocess.Popen(
        argv,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that both ends can be ended together
    )
    try:
        out, said = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise OSError(f"no end after {timeout_s:g} s") from None
    if process.returncode or not out.strip():
        raise OSError(f"code {process.returncode}: {said.strip()[-300:]}")
    samples: list[Sample] = json.loads(out.strip().splitlines()[-1])
    return samples


def table(samples: list[Sample]) -> str:
    """A block per size, a line per way; idle first, then with both ends busy."""
    lines = []
    for busy in (False, True):
        for size in sorted({s["size"] for s in samples if s["busy"] is busy}):
            title = f"{size_text(size)}{', both ends hold the GIL' if busy else ''}"
            lines += [
                f"{title:<36}{'p50 us':>11}{'p99 us':>11}{'msg/s':>10}{'GB/s':>10}{'CPU s/GB':>10}"
                f"{'copies to':>11}{'from':>7}"
            ]
            lines += [_line(s) for s in samples if s["size"] == size and s["busy"] is busy]
            lines.append("")
    return "\n".join(lines).rstrip()


def _line(sample: Sample) -> str:
    def cell(key: str, factor: float = 1.0) -> str:
        return report.number(sample[key] * factor) if key in sample else "-"

    def copies(key: str) -> str:
        return f"{sample[key]:.2f}" if key in sample else "-"

    fill = ", zeros" if sample["fill"] == "zeros" else ""
    return (
        f"  {sample['way'] + fill:<34}{cell('p50_s', 1e6):>11}{cell('p99_s', 1e6):>11}"
        f"{cell('messages_per_s'):>10}{cell('gb_per_s'):>10}{cell('cpu_s_per_gb'):>10}"
        f"{copies('copies_receiver'):>11}{copies('copies_sender'):>7}"
    )


def size_text(size: int) -> str:
    """64 B, 16 KiB, 2 MiB, 1 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks transports",
        description="Bytes between two processes, by each way: latency, rate, CPU, copies. "
        "Round trips are there and back; copies are peak memory / payload, of a message that is "
        "sent alone.",
    )
    parser.add_argument("--ways", default="", help=f"comma-separated, of {', '.join(WAYS)}")
    parser.add_argument("--quick", action="store_true", help="few sizes, only random bytes")
    parser.add_argument("--out", type=Path, help="folder for the JSON, the plots and the page")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per pair [120]")
    return parser
