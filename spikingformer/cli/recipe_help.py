"""What recipes there are, and what can be in one."""


def print_recipes() -> int:
    """Every recipe of the package with the first line of its comment."""
    from spikingformer.training.recipe import recipes_folder

    folder = recipes_folder()
    for path in sorted(folder.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"recipes/{path.relative_to(folder)}  {first}")
    return 0


def print_fields() -> int:
    """Every key with type, default and meaning."""
    from pydantic_core import PydanticUndefined

    from spikingformer.training.recipe import Recipe
    from spikingformer.training.recipe_text import fields_of, type_name

    for name, field in fields_of(Recipe).items():
        default = "required" if field.default is PydanticUndefined else f"default {field.default!r}"
        print(f"{name}  ({type_name(field)}, {default})\n    {field.description}")
    return 0
