"""What is wrong with a data folder, before a long run finds out."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from spikingformer.data.folder import PictureFiles, UnreadablePicture
from spikingformer.data.settings import DataSettings
from spikingformer.data.shards import ShardPictures, TarPictures, shard_paths
from spikingformer.data.sources import SOURCES, data_root, event_names, load_part


@dataclass
class Findings:
    """Facts (counts by part) and problems, each a sentence that names files."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_data(data: DataSettings, workers: int = 2, every: int = 1) -> Findings:
    """Reads the whole set (or each `every`-th file) as a run would: parts, classes, readability, sizes.

    Raises ValueError for an event set and for an unknown name.
    """
    if data.name not in SOURCES:
        advice = ""
        if data.name == "digits_dvs":
            advice = " digits_dvs is simulated in memory: there is nothing to check."
        elif data.name in event_names():
            advice = f" `spikingformer data {data.name} --from DIR --verify` checks that event set."
        raise ValueError(
            f"only picture sets can be checked here: got {data.name!r}, expected one of {', '.join(SOURCES)}.{advice}"
        )
    findings = Findings()
    classes: dict[str, set[str]] = {}
    for name in ("train", "test"):
        try:
            part = load_part(data, name)
        except (ValueError, OSError) as error:
            if str(error) not in findings.problems:
                findings.problems.append(str(error))
            continue
        counts = Counter(part.labels.tolist())
        present = {part.class_names[label] for label in counts}
        classes[name] = present
        facts: dict[str, Any] = {
            "samples": len(part),
            "classes": len(present),
            "fewest_in_a_class": min(counts.values()),
            "most_in_a_class": max(counts.values()),
        }
        if part.samples is not None:
            facts |= _decode_all(part.samples, range(0, len(part), every), workers, findings)
        if isinstance(part.samples, PictureFiles | TarPictures | ShardPictures):
            left_out = part.samples.left_out()
            facts["left_out"] = left_out.total()
            if left_out:
                facts["left_out_kinds"] = ", ".join(f"{kind} {count}" for kind, count in sorted(left_out.items()))
        findings.facts[name] = facts
    if len(classes) == 2 and classes["train"] != classes["test"]:
        for here, there in (("train", "test"), ("test", "train")):
            only = sorted(classes[here] - classes[there])
            if only:
                findings.problems.append(f"{len(only)} classes only in the {here} part, first {only[0]!r}")
    if data.name == "wds":
        _find_unnamed_shards(data, findings)
    return findings


def _find_unnamed_shards(data: DataSettings, findings: Findings) -> None:
    """Tars in the folder that a run would never open, since no pattern names them."""
    root = data_root(data)
    named = {path for pattern in (data.train_shards, data.test_shards) for path in shard_paths(root, pattern, False)}
    unnamed = sorted(set(root.rglob("*.tar")) - named)
    if unnamed:
        findings.problems.append(
            f"{root}: {len(unnamed)} shards that no pattern names, first {unnamed[0].relative_to(root)}: set "
            f"data.train_shards (now {data.train_shards}) and data.test_shards (now {data.test_shards})"
        )


def _decode_all(samples: Any, indices: range, workers: int, findings: Findings) -> dict[str, Any]:
    unreadable: list[UnreadablePicture] = []
    sizes: Counter[tuple[int, int]] = Counter()

    def decode(index: int) -> UnreadablePicture | tuple[int, int]:
        picture, _ = samples[index]
        return picture if isinstance(picture, UnreadablePicture) else picture.size

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for found in pool.map(decode, indices):
            if isinstance(found, UnreadablePicture):
                unreadable.append(found)
            else:
                sizes[found] += 1
    for bad in unreadable[:20]:
        findings.problems.append(f"{bad.file}: not a readable picture ({bad.reason})")
    if len(unreadable) > 20:
        findings.problems.append(f"... and {len(unreadable) - 20} more unreadable pictures")
    sides = [min(size) for size in sizes]
    return {
        "decoded": len(indices),
        "unreadable": len(unreadable),
        "smallest_side": min(sides, default=0),
        "sizes": len(sizes),
    }
