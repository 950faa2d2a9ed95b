"""Lists recipes and their keys."""

import json


def _first_sentence(text: str) -> str:
    """The first sentence of the comment at the top of a recipe; it may span several lines."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith(("# Published:", "# Ours:")):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines).partition(". ")[0].removesuffix(".")


def print_recipes(as_json: bool = False) -> int:
    """Prints every recipe of the package with the first sentence of its comment."""
    from spikingformer.training.recipe import recipes_folder

    folder = recipes_folder()
    found = {
        f"recipes/{path.relative_to(folder)}": _first_sentence(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.yaml"))
    }
    print(json.dumps(found) if as_json else "\n".join(f"{name}  {first}" for name, first in found.items()))
    return 0


def print_fields(as_json: bool = False) -> int:
    """Prints every key with type, default and meaning."""
    from pydantic_core import PydanticUndefined, to_jsonable_python

    from spikingformer.training.recipe import Recipe
    from spikingformer.training.recipe_text import fields_of, type_name

    fields = fields_of(Recipe)
    if as_json:
        found = {}
        for name, field in fields.items():
            required = field.default is PydanticUndefined
            found[name] = {"type": type_name(field), "required": required, "meaning": field.description}
            if not required:
                found[name]["default"] = to_jsonable_python(field.default)
        print(json.dumps(found))
        return 0
    for name, field in fields.items():
        default = "required" if field.default is PydanticUndefined else f"default {field.default!r}"
        print(f"{name}  ({type_name(field)}, {default})\n    {field.description}")
    return 0
