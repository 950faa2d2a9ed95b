"""`spikingformer convert FILE`: converts a published .pth or .pth.tar into a checkpoint."""

import argparse

_CIFAR100_HEADS = 8  # of the published models; those for CIFAR-10 have 12


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a published .pth into a checkpoint",
        description="Reads only weights: code in the file is never run. Weights that do not fit are an error.",
        epilog="example: spikingformer convert x.pth.tar --model spikingformer_cml_8_384 --output x.safetensors",
    )
    parser.add_argument("file", help=".pth or .pth.tar: a state dict, bare or under `state_dict`, `model`, ...")
    parser.add_argument(
        "--model", required=True, help="the model that the weights belong to (see `spikingformer models`)"
    )
    parser.add_argument("--output", required=True, help="file to write, .safetensors")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="picture size (default: the model's own)")
    parser.add_argument(
        "--num-heads",
        type=int,
        help="attention heads, which the weights do not show (default: the model's own; CIFAR-100: 8)",
    )
    parser.add_argument("--time-steps", type=int, help="time steps (default: the model's own)")
    parser.add_argument(
        "--mean", type=float, nargs="+", help="per-channel mean of the training pictures (default: the model's own)"
    )
    parser.add_argument(
        "--std", type=float, nargs="+", help="per-channel standard deviation (default: the model's own)"
    )
    parser.add_argument(
        "--class-names", metavar="FILE", help="a text file with one class name per line (default: numbers)"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json
    import sys
    from pathlib import Path
    from typing import Any

    import torch

    from spikingformer.data.cifar import cifar_files
    from spikingformer.models import SpikingTransformer
    from spikingformer.official import convert_state_dict, described_by, doubts, our_name, weights_of
    from spikingformer.training.checkpoint import ModelInfo, create_model, load_weights, save_model, versions
    from spikingformer.training.foreign import read_published

    source, output = Path(args.file), Path(args.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: expected a name that ends in .safetensors")
    weights = weights_of(read_published(source), source)
    asked = {"img_size": args.img_size, "num_heads": args.num_heads, "time_steps": args.time_steps}
    with torch.device("meta"):
        named = create_model(args.model, {})  # read for its configuration alone
    cfg: dict[str, Any] = dict(named.pretrained_cfg)  # type: ignore[arg-type]  # timm's, set on every model
    if not isinstance(named, SpikingTransformer):
        raise ValueError(f"--model {args.model}: not a model of this package; `spikingformer models` lists them")
    family = named.family()
    try:
        sizes = described_by(weights, family)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    other = {name: value for name, value in sizes.items() if value != getattr(named.config, name)}
    kwargs: dict[str, Any] = {**sizes, "img_size": cfg["input_size"][1]}
    kwargs |= {name: value for name, value in asked.items() if value is not None}
    mean, std = cfg["mean"], cfg["std"]
    if kwargs["num_classes"] == 100 and kwargs["img_size"] == 32:
        kwargs.setdefault("num_heads", _CIFAR100_HEADS)
        statistics = cifar_files("cifar100")
        mean, std = statistics.mean, statistics.std
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{source}: NaN or infinity in {broken[0]}: the file is damaged, or its training diverged")
    model = create_model(args.model, kwargs)
    events: bool = model.config.takes_events  # type: ignore[union-attr, assignment]
    if events:  # counts are not normalised
        mean, std = (0.0, 0.0), (1.0, 1.0)
    mean = mean if args.mean is None else args.mean
    std = std if args.std is None else args.std
    converted = convert_state_dict(weights, model)
    unsure = doubts(weights, model)  # type: ignore[arg-type]
    load_weights(model, converted, source)
    classes = kwargs["num_classes"]
    names = tuple(str(number) for number in range(classes))
    if args.class_names:
        names = tuple(
            line.strip() for line in Path(args.class_names).read_text(encoding="utf-8").splitlines() if line.strip()
        )
        if len(names) != classes:
            raise ValueError(f"{args.class_names}: {len(names)} names, the checkpoint has {classes} classes")
    info = ModelInfo(
        name=args.model,
        kwargs=kwargs,
        class_names=names,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=cfg["interpolation"],
        crop_fraction=cfg["crop_pct"],
        kind="events" if events else "pictures",
        source=f"converted from {source.name}",
        versions=versions(),
    )
    save_model(output, converted, info)
    dropped = [name for name in weights if our_name(name, family) is None]
    heads = model.config.num_heads  # type: ignore[union-attr]
    for doubt in unsure:
        print(f"warning: {doubt}: is --model {args.model} right?", file=sys.stderr)
    if args.json:
        written = {"file": str(output), "model": args.model, "kwargs": {**kwargs, "num_heads": heads}}
        written |= {"tensors": len(converted), "dropped": dropped, "mean": info.mean, "std": info.std}
        print(json.dumps({**written, "warnings": unsure}))
        return 0
    print(f"{output}: {args.model}, {len(converted)} tensors, {classes} classes, {heads} attention heads")
    print(f"pictures are normalised with mean {info.mean} and standard deviation {info.std}")
    if other:
        differing = ", ".join(f"{name} {value} (not {getattr(named.config, name)})" for name, value in other.items())
        print(f"the weights differ in size from {args.model}: {differing}")
    if dropped:
        print(f"dropped, because the published models never use them: {', '.join(dropped)}")
    return 0
