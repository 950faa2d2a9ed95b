"""Refuses options that a command has but would ignore in this call."""

import argparse
from collections.abc import Iterable


def refuse_given(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises ValueError for the first given one of the options `names`. Their defaults must be None, False or []."""
    for name in names:
        value = getattr(args, name)
        if value is None or value is False or value == []:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        raise ValueError(" ".join([f"--{name.replace('_', '-')}", *words]).rstrip() + f": {why}")
