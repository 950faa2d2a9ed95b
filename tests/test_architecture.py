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
    "native": 0,
}


def imported(path: Path) -> set[str]:
    """Absolute names that a file imports from the package."""
    package = ("spikingformer", *path.relative_to(ROOT).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{a.name}" for a in node.names}
    return {n for n in names if n.startswith("spikingformer.")}


def layer(name: str) -> str:
    return name.split(".")[1]


FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem in LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        target = layer(name)
        if target == own or target == "__version__":
            continue
        assert target in LEVELS, f"{name}: give its layer a level"
        if (own, target) == ("native", "neurons"):  # the kernels serve the neuron's configuration
            continue
        assert LEVELS[target] < LEVELS[own], f"{own} (level {LEVELS[own]}) imports {name} (level {LEVELS[target]})"


def test_the_check_can_fail():
    assert "spikingformer.neurons.LIF" in imported(ROOT / "layers" / "conv.py")
    assert LEVELS["layers"] > LEVELS["neurons"]
