"""How an event model's input was cut from recordings, which every file of such a model must remember."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Framing:
    """`split_by`: frames hold equally many events ("number") or last equally long ("time").
    `window_us`: length of a training sample, microseconds; 0: whole recordings of their own lengths."""

    split_by: Literal["number", "time"] = "number"
    window_us: int = 0

    def __post_init__(self) -> None:
        if self.split_by not in ("number", "time"):
            raise ValueError(f'split_by must be "number" or "time", got {self.split_by!r}')
        if isinstance(self.window_us, bool) or not isinstance(self.window_us, int) or self.window_us < 0:
            raise ValueError(f"window_us must be a whole number of at least 0, got {self.window_us!r}")


def framing_of(data: Mapping[str, Any]) -> Framing:
    """The framing of a recipe's `data` section."""
    from .catalogue import CATALOGUE  # late: files of picture models need no table of event sets

    data_set = CATALOGUE.get(data.get("name", ""))
    window_us = data_set.window_us.get(data.get("split", ""), 0) if data_set is not None else 0
    return Framing(data.get("split_by", "number"), window_us)
