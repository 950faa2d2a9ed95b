"""Figures in hand-written pages, traced: each stands in a line that names the results file and key it comes from.

    It runs 3.41 times as fast, 812 pictures/s. <!-- from: benchmarks/results/x.json#speedup x.json#best.rate -->

A key is a path of names and list positions (`runs.0.best_top1`), `*100` behind it turns a share into percent. The
value, rounded as the line shows it, must stand in the line. `<!-- fact: SOURCE -->` marks figures that nobody measured
here: published ones, sizes, definitions.
"""

import json
import re
from pathlib import Path
from typing import Any

_COMMENT = re.compile(r"<!--\s*(from|fact):\s*(.*?)\s*-->")
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?")
_UNITS = (
    r"%|points|times as fast|times faster|x faster|(?:pictures|samples|images|events|frames|recordings)/s|"
    r"[nµumk]?s\b|ms\b|h\b|hours?\b|minutes?\b|seconds?\b|[pnµum]J\b|W\b|[kMG]i?B\b"
)
_FIGURE = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+)?\s?(?:{_UNITS})")


def _prose(text: str) -> list[tuple[int, str]]:
    """Numbered lines outside code blocks."""
    lines, inside = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            lines.append((number, line))
    return lines


def untraced_figures(text: str) -> list[str]:
    """Lines that show a number with a unit and name neither a results file nor a source."""
    return [
        f"line {n}: {line.strip()}"
        for n, line in _prose(text)
        if _FIGURE.search(re.sub(r"`[^`]*`", "", line)) and not _COMMENT.search(line)
    ]


def look_up(root: Path, reference: str) -> float:
    """The value of `FILE#KEY` or `FILE#KEY*100`. Raises ValueError where there is none or it is no number."""
    file, _, key = reference.partition("#")
    key, _, factor = key.partition("*")
    path = root / file
    if not path.is_file():
        raise ValueError(f"{reference}: no file {file}")
    value: Any = json.loads(path.read_text(encoding="utf-8"))
    for part in key.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"{reference}: no {part!r} in {file}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{reference}: expected a number, got {value!r}")
    return value * float(factor or 1)


def _shows(line: str, value: float) -> bool:
    for text in _NUMBER.findall(line):
        plain = text.replace(",", "").lstrip("+")
        decimals = len(plain.partition(".")[2])
        if abs(float(plain) - value) <= 0.5 * 10**-decimals * (1 + 1e-9):
            return True
    return False


def wrong_traces(text: str, root: Path) -> list[str]:
    """What is wrong with the traces of a page: no such file or key, or another value than the line shows."""
    problems = []
    for number, line in _prose(text):
        for kind, content in _COMMENT.findall(line):
            if kind == "fact":
                continue
            shown = _COMMENT.sub("", line)
            for reference in content.split():
                try:
                    value = look_up(root, reference)
                except ValueError as error:
                    problems.append(f"line {number}: {error}")
                    continue
                if not _shows(shown, value):
                    problems.append(f"line {number}: {reference} is {value:.6g}, which the line does not show")
    return problems
