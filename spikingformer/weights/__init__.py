"""Trained weights that come with the package, by timm's MODEL.TAG names; `table.json` says what each file is."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent
TABLE_FILE = "table.json"


@dataclass(frozen=True)
class Shipped:
    """One weights file. kwargs: for timm.create_model. mean, std: per channel, for pictures scaled to [0, 1].

    top1: percent on `part`. recipe: what it was trained by. result: the results file of that training.
    """

    model: str
    tag: str
    file: str
    sha256: str
    kwargs: dict[str, Any]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_fraction: float
    top1: float
    recipe: str
    result: str
    part: str = "test part"

    @property
    def name(self) -> str:
        """MODEL.TAG"""
        return f"{self.model}.{self.tag}"

    @property
    def path(self) -> Path:
        return _FOLDER / self.file

    def check(self) -> None:
        """Raises ValueError where the file is missing or not the one the table describes."""
        if not self.path.is_file():
            raise ValueError(f"{self.name}: {self.path} is missing: install the package again")
        found = hashlib.sha256(self.path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{self.name}: {self.path} is damaged: expected sha256 {self.sha256}, got {found}: "
                "install the package again"
            )


def read_table(folder: Path = _FOLDER) -> dict[str, Shipped]:
    """What a weights folder holds, by MODEL.TAG."""
    path = folder / TABLE_FILE
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        for key in ("class_names", "mean", "std"):
            row[key] = tuple(row[key])
        row["kwargs"] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["kwargs"].items()}
    return {f"{row['model']}.{row['tag']}": Shipped(**row) for row in rows}


@cache
def shipped_weights() -> dict[str, Shipped]:
    """The package's own weights, by MODEL.TAG."""
    return read_table()


def shipped_file(name: str) -> Path | None:
    """The checked file of MODEL.TAG, None for a name that is not shipped. Raises ValueError where it is damaged."""
    entry = shipped_weights().get(name)
    if entry is None:
        return None
    entry.check()
    return entry.path
