"""The picture in docs/architecture.md, held true: an import may only go down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "spikingformer"
LEVELS = {  # higher may import lower or equal-by-name; equals of another name may not import each other
    "cli": 6,
    "reports": 5,
    "export": 5,
    "reproduce": 4.5,
    "official": 5,
    "training": 4,
    "energy": 3.8,  # training watches rates and energy
    "benchmarks": 4.2,  # times the step as training runs it
    "engine": 3.5,
    "models": 3,
    "data": 3,
    "layers": 2,
    "neurons": 1,
    "weights": 0,
    "files": 0,
    "picture_statistics": 0,
    "native": 0,
}


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Absolute names that a file imports from the package in `root`."""
    package = ("spikingformer", *path.relative_to(root).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{a.name}" for a in node.names}
    return {n for n in names if n.startswith("spikingformer.")}


def wrong_imports(path: Path, root: Path = ROOT) -> list[str]:
    """What a file imports from a layer that is not below its own."""
    own = path.relative_to(root).parts[0].removesuffix(".py")
    wrong = []
    for name in sorted(imported(path, root)):
        target = name.split(".")[1]
        if target in (own, "__version__") or (own, target) == ("native", "neurons"):  # the kernels serve the neuron
            continue
        if target not in LEVELS:
            wrong.append(f"{name}: give its layer a level")
        elif LEVELS[target] >= LEVELS[own]:
            wrong.append(f"{own} (level {LEVELS[own]}) imports {name} (level {LEVELS[target]})")
    return wrong


FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem in LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert wrong_imports(path) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from spikingformer.export.hub import save_hub_folder", "(level 5)"),
        ("from ..models import VARIANTS", "(level 3)"),
        ("import spikingformer.energy", "(level 3.8)"),
        ("def late():\n    from spikingformer import data", "(level 3)"),
        ("from spikingformer.tools import x", "give its layer a level"),
        ("from spikingformer.neurons import LIF\nfrom .pool import POOLS\nfrom spikingformer import __version__", None),
    ],
    ids=["absolute", "relative", "module", "inside", "unknown", "allowed"],
)
def test_the_check_can_fail(tmp_path, line, found):
    path = tmp_path / "layers" / "made_up.py"
    path.parent.mkdir()
    path.write_text(line)
    wrong = wrong_imports(path, tmp_path)
    assert len(wrong) == (found is not None)
    assert all(found in text for text in wrong)
