"""The samples as plots (PNG) and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from benchmarks import report

Sample = dict[str, Any]

PLOTS = (
    ("throughput", "gb_per_s", False, "GB/s, one way", "How fast large messages flow"),
    ("latency", "p50_s", False, "seconds, there and back (median)", "A lone round trip"),
    ("busy", "gb_per_s", True, "GB/s, one way", "Both ends run code that holds the GIL"),
    ("busy_latency", "p50_s", True, "seconds (median)", "A round trip while the GIL is held"),
    ("cpu", "cpu_s_per_gb", False, "CPU seconds per GB, both ends", "What a GB costs"),
)
"""(file, field, busy, axis, title)"""


def write(folder: Path, machine: dict[str, Any], samples: list[Sample], table: str) -> None:
    """transports.html and a PNG per plot; without matplotlib only the page, without plots."""
    images = []
    for name, field, busy, axis, title in PLOTS:
        chosen = [s for s in samples if s["busy"] is busy and field in s and s["fill"] == "random"]
        data = plot(chosen, field, axis, title) if chosen else None
        if data is not None:
            (folder / f"{name}.png").write_bytes(data)
            images.append((title, base64.b64encode(data).decode()))
    (folder / "transports.html").write_text(render(machine, images, table))


def plot(samples: list[Sample], field: str, axis: str, title: str) -> bytes | None:
    """One line per way over the size of a message, both axes logarithmic."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=90)
    marks = "osD^v<>PX*hd"
    for number, way in enumerate(dict.fromkeys(s["way"] for s in samples)):
        points = sorted((s["size"], s[field]) for s in samples if s["way"] == way)
        ours = way.startswith("zmq")
        axes.plot(
            *zip(*points, strict=True),
            label=way,
            marker=marks[number % len(marks)],
            markersize=4,
            linewidth=1.8 if ours else 1.0,
            linestyle="-" if ours else "--",
        )
    axes.set(xscale="log", yscale="log", xlabel="bytes per message", ylabel=axis, title=title)
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png")
    pyplot.close(figure)
    return out.getvalue()


def render(machine: dict[str, Any], images: list[tuple[str, str]], table: str) -> str:
    """The page."""
    figures = "\n".join(
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></figure>'
        for title, data in images
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Transports</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
figure {{ margin: 1em 0 }} img {{ max-width: 100% }} pre {{ font-size: 12px; overflow-x: auto }}
</style>
<h1>Bytes between two processes</h1>
<p>{html.escape(report.header(machine)).replace(chr(10), "<br>")}</p>
{figures}
<h2>All figures</h2>
<pre>{html.escape(table)}</pre>
</html>
"""
