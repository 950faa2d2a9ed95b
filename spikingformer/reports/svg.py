"""Charts as inline SVG: no library, no network, colours from the page's style sheet (light and dark)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 480  # user units of every chart; the page scales it
SERIES = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)", "var(--c7)", "var(--c8)")


def document(height: float, body: str, label: str, width: float = WIDTH) -> str:
    """An <svg> of `width` by `height` user units, scaled to the page's column."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def text(x: float, y: float, content: str, anchor: str = "start", style: str = "") -> str:
    """One line of text; `anchor`: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(content)}</text>'


def rect(x: float, y: float, w: float, h: float, fill: str, tip: str = "", extra: str = "") -> str:
    """A rectangle with an optional tooltip."""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    size = f'width="{max(w, 0):.2f}" height="{max(h, 0):.2f}"'
    return f'<rect x="{x:.2f}" y="{y:.2f}" {size} fill="{fill}" {extra}>{title}</rect>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def ramp(share: float) -> str:
    """Colour of a heat map's cell, 0 to 1: from the page's background to its accent."""
    return f"color-mix(in oklab, var(--accent) {100 * min(max(share, 0), 1):.0f}%, var(--cell))"


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    y_low: float | None = None,
    x_range: tuple[float, float] | None = None,
) -> str:
    """Lines over a shared x, or over `x_range`; a marker where a series has one point only."""
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    x0, x1 = x_range or (min(p[0] for p in points), max(p[0] for p in points))
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    y0 = y0 if y_low is None else min(y_low, y0)
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.05 or 1.0
    y0, y1 = (y0 if y_low is not None else y0 - pad), y1 + pad
    left, right, top, bottom, height = 56, 12, 34, 40, 270
    w, h = WIDTH - left - right, height - top - bottom

    def px(x: float) -> float:
        return left + (w * (x - x0) / (x1 - x0) if x1 > x0 else w / 2)

    def py(y: float) -> float:
        return top + h - h * (y - y0) / (y1 - y0)

    body = []
    for y in ticks(y0, y1, 4):
        body.append(f'<line x1="{left}" x2="{left + w}" y1="{py(y):.1f}" y2="{py(y):.1f}" class="grid"/>')
        body.append(text(left - 6, py(y) + 4, f"{y:g}" if abs(y) >= 1e-3 or y == 0 else f"{y:.1e}", "end", "tick"))
    for x in ticks(x0, x1, 5):
        body.append(text(px(x), top + h + 18, f"{x:g}", "middle", "tick"))
    at = float(left)
    for colour, (name, line) in zip(SERIES, series.items(), strict=False):
        kept = [(px(x), py(y)) for x, y in line if math.isfinite(y)]
        if len(kept) == 1:
            body.append(f'<circle cx="{kept[0][0]:.1f}" cy="{kept[0][1]:.1f}" r="4" fill="{colour}"/>')
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        for (x, y), (vx, vy) in zip(kept, [p for p in line if math.isfinite(p[1])], strict=True):
            if len(kept) <= 60:
                body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="transparent">'
                            f"<title>{escape(name)}: {vy:.4g} at {vx:g}</title></circle>")  # fmt: skip
        if len(series) > 1:
            body.append(rect(at, 10, 12, 12, colour) + text(at + 17, 21, name, style="legend"))
            at += 34 + 7.6 * len(name)
    if len(series) == 1:
        body.append(text(left, 21, y_label, style="legend"))
    body.append(text(left + w / 2, height - 4, x_label, "middle", "axis"))
    return document(height, "".join(body), f"{y_label} over {x_label}")


def bar_chart(
    rows: Sequence[tuple[str, float, str]], reference: Sequence[tuple[str, float]] = (), label: str = ""
) -> str:
    """Horizontal bars (name, value, text at the bar's end), with dashed reference lines (name, value)."""
    most = max([value for _, value, _ in rows] + [value for _, value in reference] + [1e-30])
    left, row = 150, 30
    w = WIDTH - left - 92
    top = 10 + 18 * len(reference)
    body = []
    height = top + row * len(rows) + 8
    for i, (name, value) in enumerate(reference):
        x = left + w * value / most
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{16 + 18 * i}" y2="{height - 4}" class="reference"/>')
        end = x > left + w * 0.5
        body.append(text(x + (-6 if end else 6), 15 + 18 * i, name, "end" if end else "start", "tick"))
    for i, (name, value, shown) in enumerate(rows):
        y = top + row * i
        body.append(text(left - 8, y + 18, name, "end", "legend"))
        body.append(rect(left, y + 4, max(w * value / most, 1.5), row - 10, SERIES[0], f"{name}: {shown}", 'rx="2"'))
        body.append(text(left + w * value / most + 6, y + 18, shown, style="tick"))
    return document(height, "".join(body), label or "bars")


def stacked_bars(rows: Sequence[tuple[str, dict[str, float]]], unit: str, label: str) -> str:
    """Horizontal stacks: (name, {part: value}); a legend of the parts on top."""
    parts = list(dict.fromkeys(p for _, values in rows for p in values))
    most = max((sum(values.values()) for _, values in rows), default=0) or 1.0
    left, row = 150, 22
    w = WIDTH - left - 66
    body, at, line = [], 8.0, 0
    for colour, part in zip(SERIES, parts, strict=False):
        width = 34 + 7.4 * len(part)
        if at + width > WIDTH:
            at, line = 8.0, line + 1
        body.append(rect(at, 6 + 20 * line, 12, 12, colour) + text(at + 17, 17 + 20 * line, part, style="legend"))
        at += width
    top = 34 + 20 * line
    for i, (name, values) in enumerate(rows):
        y, x = top + row * i, float(left)
        body.append(text(left - 8, y + 15, name, "end", "tick"))
        for colour, part in zip(SERIES, parts, strict=False):
            if values.get(part):
                size = w * values[part] / most
                body.append(rect(x, y + 3, size, row - 6, colour, f"{name}, {part}: {values[part]:.4g} {unit}"))
                x += size
        body.append(text(x + 5, y + 15, f"{sum(values.values()):.3g}", style="tick"))
    return document(top + row * len(rows) + 6, "".join(body), label)


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]],
    columns: Sequence[str],
    x_label: str,
    percent: bool = True,
    label: str = "",
) -> str:
    """Cells row by row, the largest value darkest; the value stands in cells that are wide enough."""
    if not rows:
        return ""
    longest = max(len(name) for name, _ in rows)
    left = min(200.0, 14 + 7.0 * longest)
    most = max((v for _, values in rows for v in values), default=0) or 1.0
    w, row, top = WIDTH - left - 4, 22 if len(rows) <= 40 else 17, 6
    cell = w / max(len(columns), 1)
    body = []
    for i, (name, values) in enumerate(rows):
        y = top + row * i
        body.append(text(left - 7, y + row / 2 + 4, name, "end", "tick"))
        for j, v in enumerate(values):
            shown = f"{v:.1%}" if percent else f"{v:g}"
            body.append(rect(left + cell * j, y, cell - 1, row - 1, ramp(v / most), f"{name}, {columns[j]}: {shown}"))
            if cell >= 44:
                style = "cell high" if v / most > 0.55 else "cell"
                body.append(text(left + cell * (j + 0.5), y + row / 2 + 4, shown, "middle", style))
    y = top + row * len(rows)
    every = max(1, math.ceil(len(columns) / max(1, w / 34)))
    for j, name in enumerate(columns):
        if j % every == 0:
            body.append(text(left + cell * (j + 0.5), y + 15, name, "middle", "tick"))
    body.append(text(left + w / 2, y + 33, x_label, "middle", "axis"))
    return document(y + 40, "".join(body), label or x_label)


def confusion(table: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Rows: true class, columns: prediction; colour by the share of the row, errors in the second colour."""
    n = len(names)
    names = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    left = min(190.0, 16 + 7.2 * max(len(name) for name in names))
    cell = (WIDTH - left - 4) / n
    top, size = 22.0, min(cell, 40.0)
    body = [text(left + cell * n / 2, 14, "prediction", "middle", "axis")]
    for i, row in enumerate(table):
        total = max(sum(row), 1)
        y = top + size * i
        if size >= 9:
            body.append(text(left - 6, y + size / 2 + 4, names[i], "end", "tick"))
        for j, count in enumerate(row):
            share = count / total
            colour = ramp(share) if i == j else (
                f"color-mix(in oklab, var(--c2) {100 * min(1.0, share * 4):.0f}%, var(--cell))")  # fmt: skip
            body.append(
                rect(left + cell * j, y, cell - 1, size - 1, colour, f"{names[i]} taken for {names[j]}: {count}")
            )
            if cell >= 24 and size >= 16 and count:
                style = "cell high" if (share if i == j else share * 4) > 0.55 else "cell"
                body.append(text(left + cell * (j + 0.5), y + size / 2 + 4, str(count), "middle", style))
    y = top + size * n
    if cell >= 9:
        for j, name in enumerate(names):
            x = left + cell * (j + 0.5)
            if 7 * len(name) <= cell:
                body.append(text(x, y + 15, name, "middle", "tick"))
            else:
                body.append(f'<text x="{x:.1f}" y="{y + 6:.1f}" class="tick" text-anchor="end" '
                            f'transform="rotate(-60 {x:.1f} {y + 6:.1f})" dy="8">{escape(name)}</text>')  # fmt: skip
    tail = 22 if all(7 * len(name) <= cell for name in names) else 12 + 6.2 * max(len(name) for name in names)
    return document(y + tail, "".join(body), "confusion matrix")
