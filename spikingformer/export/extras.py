"""Packages that only an export format needs."""

from importlib.util import find_spec


def require(*modules: str) -> None:
    """Raises ValueError that says what to install if a module is missing."""
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise ValueError(
            f"this format needs the package {missing[0]!r}, which is not installed: pip install 'spikingformer[export]'"
        )
