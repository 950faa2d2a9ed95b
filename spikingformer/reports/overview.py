"""One figure of a report, for a README: a sample on its way through the model, step by step, and what it costs."""

from __future__ import annotations

from html import escape

from . import svg
from .collect import ReportData
from .samples import SampleView

_COLOURS = {"ink": "#1d2430", "soft": "#5f6b7c", "line": "#e4e1da", "bar": "#1b7f95", "other": "#c9cfd4"}
_CELL, _GAP, _TOP = 74, 8, 92


def _text(
    x: float, y: float, content: str, size: int = 13, anchor: str = "start", colour: str = "ink", weight: int = 400
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{_COLOURS[colour]}" '
        f'font-weight="{weight}">{escape(content)}</text>'
    )


def _image(x: float, y: float, side: float, uri: str, smooth: bool = False) -> str:
    style = "" if smooth else ' style="image-rendering:pixelated"'
    return f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" href="{uri}"{style}/>'


def overview(data: ReportData) -> str:
    """A standalone SVG on white. Raises ValueError where the report shows no samples."""
    if not data.views:
        raise ValueError("the figure needs a sample: use --show 1 or more")
    view = max((v for v in data.views if v.right), key=lambda v: v.steps[-1][1], default=data.views[0])
    rows = min(len(view.steps), 4)
    columns = [*view.maps[:3], *((f"attention, {name}", images) for name, images in view.attention[:2])]
    left = 250
    height = _TOP + rows * (_CELL + _GAP) + 26
    bars = left + 40 + len(columns) * (_CELL + _GAP) + 132
    width = bars + 300
    shape = data.shape.split(", input")[0]
    caption = "input, the same at every time step" if len(view.frames) == 1 else "first frame"
    body = [
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(24, 36, f"{data.name} on {data.data_name}", 18, weight=600),
        _text(24, 58, f"{shape}; {data.top1:.2f} % of {data.samples} test samples right", colour="soft"),
        _image(24, _TOP, 190, view.frames[0]),
        _text(24, _TOP + 212, caption, 12, colour="soft"),
        *_steps(view, columns, rows, left),
        *_bars(data, bars, width - 24),
    ]
    inner = "".join(body)
    return svg.document(height, inner, f"{data.name} at work on {data.data_name}", width).replace(
        "<svg ", '<svg font-family="system-ui,-apple-system,Segoe UI,Roboto,DejaVu Sans,sans-serif" ', 1
    )


def _steps(view: SampleView, columns: list[tuple[str, list[str]]], rows: int, left: float) -> list[str]:
    body = []
    for j, (name, _) in enumerate(columns):
        x = left + 40 + j * (_CELL + _GAP) + _CELL / 2
        short = name.replace("stem.stages.", "spikes ").replace("attention, block", "attention")
        body.append(_text(x, _TOP - 8, short, 11, "middle", "soft"))
    for t in range(rows):
        y = _TOP + t * (_CELL + _GAP)
        body.append(_text(left + 30, y + _CELL / 2 + 5, f"t = {t + 1}", 12, "end", "soft"))
        for j, (_, images) in enumerate(columns):
            x = left + 40 + j * (_CELL + _GAP)
            body.append(_image(x, y, _CELL, images[t]))
        x = left + 48 + len(columns) * (_CELL + _GAP)
        name, share = view.steps[t]
        body.append(_text(x, y + _CELL / 2, f"says {name}", 15, weight=600))
        body.append(_text(x, y + _CELL / 2 + 18, f"with {share:.0%}", 12, colour="soft"))
    return body


def _bars(data: ReportData, x: float, right: float) -> list[str]:
    ann, energy = data.energy["ann"], data.energy["totals"]["energy_mj"]
    rows = [
        ("as an ANN, FP32", ann["fp32_mj"], "other"),
        ("spiking (exact count)", energy, "bar"),
        ("as an ANN, INT8", ann["int8_mj"], "other"),
    ]
    most = max(v for _, v, _ in rows)
    body = [
        _text(x, _TOP + 4, "estimated energy a picture", 13, weight=600),
        _text(x, _TOP + 22, "45 nm, arithmetic only", 12, colour="soft"),
    ]
    for i, (name, value, colour) in enumerate(rows):
        y = _TOP + 52 + i * 58
        shown = f"{value:.3g} mJ" if value >= 0.1 else f"{value * 1e3:.3g} µJ"
        w = max((right - x - 70) * value / most, 2)
        body.append(_text(x, y, name, 12, colour="soft"))
        body.append(f'<rect x="{x:g}" y="{y + 7:g}" width="{w:.1f}" height="20" rx="3" fill="{_COLOURS[colour]}"/>')
        body.append(_text(x + w + 8, y + 22, shown, 13, weight=600))
    rate = sum(n["firing_rate"] * n["updates"] for n in data.energy["neurons"]) / max(
        sum(n["updates"] for n in data.energy["neurons"]), 1
    )
    body.append(_text(x, _TOP + 232, f"{rate:.1%} of neurons fire at a time step", 13))
    return body
