"""What the main job prints: plain text within 80 columns, the same in a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zfabric.demo.analysis import Summary
from zfabric.demo.job import Outcome

WIDTH = 79


def render(outcome: Outcome, folder: Path, full: str = "█", rule: str = "─") -> str:
    """The answer: totals, the hardest files with their hardest functions, the usual names."""
    summary = outcome.summary
    lines = [
        *_heading(f"Python below {folder}", rule),
        *_totals(summary),
        "",
        *_heading(f"The {len(summary.hardest)} most complex files", rule),
        *_hardest(outcome, folder),
        "",
        *_heading("What is imported most, and which names are used most", rule),
        *_side_by_side(summary.imports, summary.identifiers, full),
    ]
    if summary.unreadable:
        lines += ["", *_heading("Not analysed", rule), *_unreadable(summary, folder)]
    return "\n".join(lines)


def render_figures(
    outcome: Outcome, info: Mapping[str, Any] | None, full: str = "█", rule: str = "─"
) -> str:
    """What it took: tasks and their rate, bytes, each slot's share of the work.

    info: what `Client.info()` says, or None for a run without a fabric.
    """
    slots = outcome.summary.slots
    rate = outcome.tasks / outcome.seconds if outcome.seconds else 0.0
    lines = list(_heading("The fabric" if info is not None else "One process, no fabric", rule))
    lines.append(f"  {outcome.tasks:,} tasks in {outcome.seconds:.2f} s: {rate:,.0f} tasks/s")
    if info is not None:
        workers = info.get("workers", [])
        held = sum(worker.get("bytes", 0) for worker in workers)
        lines.append(
            f"  {_plural(len(workers), 'worker')}, {_plural(len(slots), 'slot')} at work; broker: "
            f"{bytes_text(info.get('bytes_in', 0))} in, {bytes_text(info.get('bytes_out', 0))} out"
        )
        lines.append(f"  values held by the workers: {bytes_text(held)}")
    total_s = sum(cpu_s for _, cpu_s in slots.values())
    for slot, (files, cpu_s) in sorted(slots.items(), key=lambda item: -item[1][1]):
        share = cpu_s / total_s if total_s else 0.0
        lines.append(
            f"  slot {slot:>9}  {share:6.1%}  {files:>7,} files  {cpu_s:7.2f} s CPU  "
            f"{full * round(share * 24)}"
        )
    return "\n".join(lines)


def bytes_text(n: float) -> str:
    """A number of bytes with its unit: 999 B, 1.2 kB, 34.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def shortened(text: str, width: int) -> str:
    """At most `width` characters; what is cut is the beginning, because a path's end tells more."""
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _heading(text: str, rule: str) -> Iterator[str]:
    yield shortened(text, WIDTH)
    yield rule * WIDTH


def _totals(summary: Summary) -> Iterator[str]:
    mean = summary.complexity / summary.functions if summary.functions else 0.0
    cells = [
        ("files", f"{summary.files:,}"),
        ("functions", f"{summary.functions:,}"),
        ("complexity", f"{summary.complexity:,}"),
        ("lines", f"{summary.lines:,}"),
        ("classes", f"{summary.classes:,}"),
        ("mean", f"{mean:.1f}"),
        ("not analysed", f"{len(summary.unreadable):,}"),
        ("modules", f"{len(summary.imports):,}"),
        ("names", f"{len(summary.identifiers):,}"),
    ]
    for row in range(0, len(cells), 3):
        yield "  " + "    ".join(f"{name:<12}{value:>10}" for name, value in cells[row : row + 3])


def _hardest(outcome: Outcome, folder: Path) -> Iterator[str]:
    yield f"  {'':<45}{'complexity':>11}{'functions':>11}{'lines':>9}"
    for place, file in enumerate(outcome.summary.hardest, 1):
        name = shortened(_relative(file.path, folder), 41)
        yield (
            f"  {place:>2}. {name:<41}{file.complexity:>11,}{file.functions:>11,}{file.lines:>9,}"
        )
        functions = outcome.functions.get(file.path, ())
        texts = [f"{function.name} {function.complexity}" for function in functions]
        while len(texts) > 1 and len(", ".join(texts)) > WIDTH - 6:
            texts.pop()
        if texts:
            yield _cut("      " + ", ".join(texts))


def _side_by_side(
    imports: Mapping[str, int], identifiers: Mapping[str, int], full: str
) -> Iterator[str]:
    left, right = _bars(imports, full), _bars(identifiers, full)
    for n in range(max(len(left), len(right))):
        a = left[n] if n < len(left) else ""
        b = right[n] if n < len(right) else ""
        yield f"  {a:<38}{b}".rstrip()


def _bars(counts: Mapping[str, int], full: str, most: int = 8) -> list[str]:
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    largest = top[0][1] if top else 1
    return [
        f"{_cut(name, 16):<16}{n:>9,} {full * max(1, round(10 * n / largest))}" for name, n in top
    ]


def _unreadable(summary: Summary, folder: Path, most: int = 5) -> Iterator[str]:
    for path, reason in summary.unreadable[:most]:
        yield f"  {shortened(_relative(path, folder), 55):<55} {reason}"
    rest = len(summary.unreadable) - most
    if rest > 0:
        yield f"  and {rest:,} more"


def _relative(path: str, folder: Path) -> str:
    try:
        return str(Path(path).relative_to(folder))
    except ValueError:
        return path


def _cut(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _plural(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("" if n == 1 else "s")


__all__: Sequence[str] = ("bytes_text", "render", "render_figures", "shortened")
