"""Class names to class numbers, one way for folders and tars; and names compared with those of a model."""

from collections.abc import Iterable, Sequence

_SHOWN = 3
_OTHER_DATA = "choose the data it was trained on with --data and --root"
_CONVERT_AGAIN = (
    "a file that was converted with other class names must be converted again with those of the data (--class-names)"
)


def timm_order(name: str) -> tuple[list[str | int], str]:
    """Sort key of classes and files as timm, and so the published code, orders them: numerals by value, upper
    and lower case alike. Names that timm takes for equal, such as 1 and 01, have a fixed order too."""
    from timm.utils.misc import natural_key

    return natural_key(name), name


def number_classes(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names), key=timm_order))}


def names_by_number(numbering: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(numbering, key=numbering.__getitem__))


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names are "0", "1", ... in order: what is used if nobody named the classes."""
    return all(name == str(number) for number, name in enumerate(names))


def check_class_count(found: int, expected: int, where: str) -> None:
    """Raises ValueError unless the data set `where` has as many classes as the model."""
    if found != expected:
        raise ValueError(f"{where} has {found} classes, but the model has {expected}: {_OTHER_DATA}")


def check_class_names(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Compares the class names of the data set `where` with the model's, number by number.

    Raises:
        ValueError: their counts or names differ; names the first that do.
    """
    check_class_count(len(found), len(expected), where)
    different = [number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    if different:
        first = ", ".join(f"{n} is {found[n]!r}, {expected[n]!r} in the model" for n in different[:_SHOWN])
        raise ValueError(
            f"{where} has other classes than the model: {len(different)} of {len(found)} differ (number {first}): "
            f"{_OTHER_DATA}; {_CONVERT_AGAIN}"
        )


def refuse_unknown(found: Iterable[str], numbering: dict[str, int], where: str, numbered_by: str) -> None:
    """Raises ValueError for classes that the numbering lacks, and names the first."""
    unknown = list(number_classes(name for name in found if name not in numbering))
    if not unknown:
        return
    first = ", ".join(repr(name) for name in unknown[:_SHOWN])
    advice = (
        f"{_OTHER_DATA}, or remove them; {_CONVERT_AGAIN}"
        if numbered_by == "model"
        else "remove them or complete the training part"
    )
    raise ValueError(
        f"{where}: {len(unknown)} class{'es' * (len(unknown) > 1)} that the {numbered_by} lacks, first {first} "
        f"(the {numbered_by} has {len(numbering)}): {advice}"
    )
