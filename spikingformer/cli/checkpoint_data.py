"""Which data a command that takes a checkpoint means: the checkpoint's own, or what the options say."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikingformer.data.settings import DataSettings
    from spikingformer.training.checkpoint import ModelInfo


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="NAME", help="data set, e.g. cifar10 (default: the one it was trained on)")
    parser.add_argument("--root", metavar="DIR", help="folder of the data set (default: that of the training)")


def data_settings(args: argparse.Namespace, info: "ModelInfo") -> "DataSettings":
    """The data section to use, with the checkpoint's picture size and statistics.

    Raises:
        ValueError: the checkpoint does not say what it was trained on and --data is not given.
    """
    from spikingformer.data.settings import DataSettings
    from spikingformer.training.recipe_text import to_json

    values = dict((info.recipe or {}).get("data", {}))
    if args.data is not None and values.get("name") != args.data:
        values = {"name": args.data}
    if not values:
        raise ValueError("the checkpoint does not say what it was trained on: add --data NAME and --root DIR")
    if args.root is not None:
        values["root"] = args.root
    size = getattr(args, "img_size", None) or info.image_size[0]
    values |= {"image_size": size, "channels": info.channels, "interpolation": info.interpolation}
    values |= {"crop_fraction": info.crop_fraction}
    if info.kind == "pictures":
        values |= {"mean": list(info.mean), "std": list(info.std)}
    else:
        values["frames"] = info.kwargs["time_steps"]
    return DataSettings.model_validate_json(to_json(values, "data"))
