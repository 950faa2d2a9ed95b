"""Recipe text: YAML in and out, `key=value` overrides, and error messages that name the right key."""

import difflib
import json
import math
import re
from collections.abc import Iterable

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

MAX_CHARACTERS = 1_000_000  # a recipe has a few hundred lines; refuses a wrong file before parsing it


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number and refuses aliases (expansion bombs) and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not allowed{_place(self.peek_event().start_mark)}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {key!r} is not a name{_place(key_node.start_mark)}")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice{_place(key_node.start_mark)}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _place(mark: yaml.Mark | None) -> str:
    return f" (line {mark.line + 1})" if mark is not None else ""


def parse_yaml(text: str, source: str) -> object:
    """Plain values of a YAML text; no Python objects are ever built from tags.

    Raises:
        ValueError: not YAML, too long, aliases, or a repeated key; names source and line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{source}: {len(text)} characters, a recipe has at most {MAX_CHARACTERS}")
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{source}: not a readable recipe: {error.problem}{_place(error.problem_mark)}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{source}: not a readable recipe: {error}") from None


def dump_yaml(values: object) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def to_json(values: dict, source: str) -> str:
    try:
        return json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: a value is not text, a number, true/false, null or a list: {error}") from None


def split_override(text: str) -> tuple[list[str], object]:
    """`model.embed_dim=128` -> (["model", "embed_dim"], 128)."""
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z_]\w*", part) for part in keys):
        raise ValueError(f"override {text!r}: expected key=value, such as epochs=2 or model.embed_dim=128")
    return keys, parse_yaml(value, f"override {text!r}")


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every leaf field by its dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted name most like `name`, or None.

    The same last part, its initials (`lr`) or its beginning in the same section (`schedule.warmup`) come before a
    similar one, and a section of about that name before the others.
    """
    known = list(known)
    section, _, leaf = name.rpartition(".")
    near = difflib.get_close_matches(section, dict.fromkeys(item.rpartition(".")[0] for item in known), n=1)
    inside = [item for item in known if item.rpartition(".")[0] in near]
    for items in (inside, known):
        for item in items:
            last = item.rpartition(".")[2]
            initials = "".join(word[0] for word in last.split("_"))
            begins = items is inside and last.startswith(f"{leaf}_")
            if leaf == last or begins or (leaf == initials and "_" in last):
                return item
    if not inside and (close := difflib.get_close_matches(name, known, n=1)):
        return close[0]
    for items in (inside, known):
        by_last = {item.rpartition(".")[2]: item for item in reversed(items)}
        if close := difflib.get_close_matches(leaf, by_last, n=1):
            return by_last[close[0]]
    return None


def _show(value: object) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def type_name(field: FieldInfo) -> str:
    """A field's type as a reader of recipes would say it: "int or null", "one of 'cpu', 'cuda'"."""
    text = str(field.annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
    return re.sub(r"Literal\[(.*?)\]", r"one of \1", text).replace(" | None", " or null")


def explain_errors(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """One line a problem: key, got, expected, the field's meaning."""
    fields = fields_of(model)
    sections = dict.fromkeys(section for name in fields if (section := name.rpartition(".")[0]))
    lines = []
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(parts)
        if problem["type"] == "extra_forbidden":
            inside = problem["input"] if isinstance(problem["input"], dict) else {}  # of a section that is not there
            for unknown in [f"{key}.{name}" for name in inside] or [key]:
                near = nearest(unknown, fields if "." in unknown else [*fields, *sections])
                lines.append(f"unknown key {unknown!r}" + (f"; did you mean {near!r}?" if near else ""))
        elif problem["type"] == "missing":
            lines.append(f"missing key {key!r}" + (f": {fields[key].description}" if key in fields else ""))
        else:
            while parts and ".".join(parts) not in fields:
                parts.pop()  # positions inside a tuple or union
            name = ".".join(parts)
            if name in fields:
                reason = problem["msg"].removeprefix("Value error, ")
                expected = f"expected {type_name(fields[name])} ({reason}): {fields[name].description}"
                lines.append(f"{name}: got {_show(problem['input'])}, {expected}")
            elif problem["type"] == "model_type" and key in sections:
                keys = ", ".join(field for field in fields if field.startswith(f"{key}."))
                lines.append(f"{key}: got {_show(problem['input'])}, but it is a section; set one of its keys: {keys}")
            else:
                lines.append(f"{key or 'recipe'}: got {_show(problem['input'])}; {problem['msg']}")
    return "\n".join(
        [
            f"{source}:",
            *(f"  {line}" for line in dict.fromkeys(lines)),
            "`spikingformer train --fields` lists every key.",
        ]
    )
