"""The label files of DVS128 Gesture: which time span of a recording shows which gesture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from .arrays import EventFileError, read_bytes

_COLUMNS = ["class", "startTime_usec", "endTime_usec"]
_MAX_ROWS = 10_000  # an official file has 12


class Trial(NamedTuple):
    """start_us <= t < end_us of the recording shows the gesture `label` (class number of the file minus 1)."""

    label: int
    start_us: int
    end_us: int


def read_trials(path: str | Path, num_classes: int = 11) -> list[Trial]:
    """Rows of a userNN_LIGHT_labels.csv in file order. Spans may overlap and a class may come twice.

    Raises EventFileError for another header, a field that is not a whole number, a class outside 1..num_classes or an
    empty or negative time span.
    """
    text = read_bytes(path).decode("ascii", "replace")
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(c.strip() for c in row)]
    except csv.Error as error:
        raise EventFileError(path, f"is not a csv file ({error}).") from None
    if not rows or rows[0] != _COLUMNS:
        raise EventFileError(path, f"has the columns {','.join(rows[0])[:80] if rows else ''!r}; expected {_COLUMNS}.")
    if len(rows) > _MAX_ROWS:
        raise EventFileError(path, f"has {len(rows)} rows; at most {_MAX_ROWS} are plausible.")
    return [_parse_row(row, number, path, num_classes) for number, row in enumerate(rows[1:], start=2)]


def _parse_row(row: list[str], number: int, path: str | Path, num_classes: int) -> Trial:
    if len(row) != 3 or not all(cell.isascii() and cell.isdigit() and len(cell) < 19 for cell in row):
        raise EventFileError(
            path, f"row {number} is {','.join(row)[:80]!r}; expected three whole numbers, none negative."
        )
    class_number, start_us, end_us = (int(cell) for cell in row)
    if not 1 <= class_number <= num_classes:
        raise EventFileError(path, f"row {number} has the class {class_number}; expected 1 to {num_classes}.")
    if start_us >= end_us:
        raise EventFileError(
            path, f"row {number} runs from {start_us} to {end_us} us: the end must be after the start."
        )
    return Trial(class_number - 1, start_us, end_us)
