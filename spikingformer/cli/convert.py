"""`spikingformer convert FILE`: a published .pth or .pth.tar into a checkpoint of ours."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "convert",
        help="a published .pth into a checkpoint of ours",
        description="Reads weights only: code in the file is never run. Every weight must find its place.",
        epilog="example: spikingformer convert x.pth.tar --model spikingformer_cml_8_384 --output x.safetensors",
    )
    parser.add_argument("file", help=".pth or .pth.tar with `state_dict` or `model`, or a bare state dict")
    parser.add_argument("--model", required=True, help="which model it is (see `spikingformer models`)")
    parser.add_argument("--output", required=True, help="file to write, .safetensors")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="picture size (default: the model's own)")
    parser.add_argument("--num-heads", type=int, help="attention heads (default: the model's own; CIFAR-10 used 12)")
    parser.add_argument("--time-steps", type=int, help="T (default: the model's own)")
    parser.add_argument(
        "--mean", type=float, nargs="+", help="per-channel mean it was trained with (default: the model's)"
    )
    parser.add_argument("--std", type=float, nargs="+", help="per-channel deviation (default: the model's)")
    parser.add_argument("--class-names", metavar="FILE", help="a class name a line (default: numbers)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path
    from typing import Any

    from spikingformer.official import convert_state_dict
    from spikingformer.training.checkpoint import ModelInfo, create_model, load_weights, save_model, versions
    from spikingformer.training.foreign import read_published, weights_of

    source, output = Path(args.file), Path(args.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: expected a name that ends in .safetensors")
    content = read_published(source)
    weights = weights_of(content, source)
    if "head.weight" not in weights or weights["head.weight"].ndim != 2:
        raise ValueError(f"{source}: no head.weight in it: not a published checkpoint of these models")
    stem = weights.get("patch_embed.proj_conv.weight")
    wanted = {
        "num_classes": weights["head.weight"].shape[0],
        "in_chans": None if stem is None else stem.shape[1],
        "img_size": args.img_size,
        "num_heads": args.num_heads,
        "time_steps": args.time_steps,
    }
    kwargs = {name: value for name, value in wanted.items() if value is not None}
    model = create_model(args.model, kwargs)
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]  # timm's, set on every model
    kwargs.setdefault("img_size", cfg["input_size"][1])
    kwargs.setdefault("in_chans", cfg["input_size"][0])
    converted = convert_state_dict(weights, model)
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
        mean=tuple(args.mean or cfg["mean"]),
        std=tuple(args.std or cfg["std"]),
        interpolation=cfg["interpolation"],
        crop_fraction=cfg["crop_pct"],
        kind="events" if kwargs["in_chans"] == 2 else "pictures",
        source=f"converted from {source.name}",
        versions=versions(),
    )
    save_model(output, converted, info)
    dropped = len(weights) - len(converted)
    print(
        f"{output}: {args.model}, {len(converted)} tensors, {classes} classes"
        + (f"; {dropped} unused keys dropped" if dropped else "")
    )
    return 0
