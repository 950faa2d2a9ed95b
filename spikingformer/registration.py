"""Puts our models into timm's registry the moment there is one: now, or right after timm is imported.

timm and torch take seconds to import and most of the command's answers need neither, so `import spikingformer` alone
does not import them.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _import_models() -> None:
    importlib.import_module("spikingformer.models")
    # The engine imports the models, which may be half imported now: it is fetched when a model first asks for it.
    whole = importlib.import_module("spikingformer.models.whole")
    whole.provide(lambda model: importlib.import_module("spikingformer.engine").whole_model(model))


class _AfterTimm(MetaPathFinder):
    """Finds timm as the other finders do, and imports our models once timm is whole."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            _import_models()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register_with_timm() -> None:
    """Every model of ours is in timm's registry after this and `import timm`, in either order."""
    if "timm" in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
