"""What a user would pick instead: a timm ViT of like size, in fp32 and int8, against ours on the same machine.

    python -m benchmarks.against_vit [--rows TEXT] [--checkpoint FILE] [--rounds N] [--output FILE]

Per row all runners are checked first (see `checked`), then run interleaved in one process; medians are compared.
A spiking model's speed depends on its firing rate, which stands beside. The ViT has random weights: its speed does not
depend on them. Accuracy is not compared here.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import spikingformer  # noqa: F401  (registers the models)
from spikingformer.benchmarks import calibrate, firing_rate
from spikingformer.benchmarks.throughput import example_input
from spikingformer.engine import Engine, int8_reference
from spikingformer.export import export_int8, export_weights

# name: (our model, arguments of the ViT: patches and depth that give as many tokens and about as many parameters)
ROWS = {
    "CIFAR 4-384": ("spikingformer_cml_4_384", {"img_size": 32, "patch_size": 4, "depth": 5, "num_classes": 10}),
    "ImageNet 8-384": ("spikingformer_cml_8_384", {"img_size": 224, "patch_size": 16, "depth": 9}),
}
VIT = "vit_small_patch16_224"  # width 384, 6 heads
Runner = Callable[[Tensor], Tensor]


def vit_runners(arguments: dict, folder: Path, threads: int) -> tuple[dict[str, Runner], dict[str, float]]:
    """The ViT in PyTorch fp32, ONNX Runtime fp32 and ONNX Runtime int8 (dynamic, products only); sizes in MB."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    vit = timm.create_model(VIT, **arguments).eval()
    x = torch.randn(2, 3, arguments["img_size"], arguments["img_size"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            vit,
            (x,),
            str(folder / "vit.onnx"),
            dynamo=True,
            external_data=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        quantize_dynamic(
            str(folder / "vit.onnx"),
            str(folder / "vit8.onnx"),
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
        )

    def session(name: str) -> Runner:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        opened = onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(opened.run(["logits"], {"input": x.numpy()})[0])

    runners = {
        "ViT torch fp32": vit,
        "ViT ONNX Runtime fp32": session("vit.onnx"),
        "ViT ONNX Runtime int8": session("vit8.onnx"),
    }
    sizes = {
        "ViT torch fp32": parameter_bytes(vit) / 1e6,
        "ViT ONNX Runtime fp32": (folder / "vit.onnx").stat().st_size / 1e6,
        "ViT ONNX Runtime int8": (folder / "vit8.onnx").stat().st_size / 1e6,
    }
    return runners, sizes


def our_runners(model: nn.Module, folder: Path) -> tuple[dict[str, Runner], dict[str, float]]:
    """The module, the compiled engine in both forms, and the sizes of their files in MB."""
    float_file = export_weights(model, folder / "ours.safetensors", check=False).size_bytes / 1e6
    int8_file = export_int8(model, folder / "ours8.safetensors", check=False).size_bytes / 1e6
    runners = {
        "ours module fp32": model,
        "ours engine fp32": Engine(model, "float32"),
        "ours engine int8": Engine(model, "int8"),
    }
    return runners, {name: int8_file if "int8" in name else float_file for name in runners}


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def checked(runners: dict[str, Runner], model: nn.Module, x: Tensor) -> dict[str, str]:
    """What was found equal before the clock; leaves the process where it is not.

    ViT in ONNX Runtime fp32 against PyTorch: 1e-3 (float32 sums of some thousand terms through 5 to 9 blocks).
    Our float engine against the float64 model: its mean error may be three times the module's (a sum in another
    order can flip a spike on its threshold). Our int8 engine against its integer definition: equal bits.
    """
    few = x[:2]
    with torch.no_grad():
        vit = {k: f(few) for k, f in runners.items() if k.startswith("ViT")}
        torch.testing.assert_close(vit["ViT ONNX Runtime fp32"], vit["ViT torch fp32"], rtol=0, atol=1e-3)
        truth = model.double()(few.double())
        model.float()
        module_error = (model(few) - truth).abs().mean().item()
        allowed = 3 * module_error + 0.01 * truth.std().item()
        found = {
            "ViT ONNX Runtime int8": f"rounds: {(vit['ViT ONNX Runtime int8'] - vit['ViT torch fp32']).abs().max():.2g}"
        }
        error = (runners["ours engine fp32"](few) - truth).abs().mean().item()
        if error > allowed:
            raise SystemExit(f"parity is broken: the fp32 engine has the error {error:.3g}, allowed {allowed:.3g}")
        found["ours engine fp32"] = f"error {error:.2g}, the module's {module_error:.2g}"
        engine = runners["ours engine int8"]
        assert isinstance(engine, Engine)
        if not torch.equal(engine(few), int8_reference.run(engine.program, few)[-1].float()):
            raise SystemExit("parity is broken: the int8 engine differs from its integer definition")
        found["ours engine int8"] = "equal to its integer definition"
    return found


def timed(runners: dict[str, Runner], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call; the runners take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    with torch.inference_mode():
        for round_ in range(rounds + 1):  # the first one warms up
            for name, run in runners.items():
                start = time.perf_counter()
                run(x)
                if round_:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def measured_row(name: str, args: argparse.Namespace) -> dict:
    model_name, vit_arguments = ROWS[name]
    torch.manual_seed(0)
    device = torch.device("cpu")
    if args.checkpoint:
        from spikingformer.training.checkpoint import load_model

        model, info = load_model(args.checkpoint)
        vit_arguments = {**vit_arguments, "num_classes": len(info.class_names)}
    else:
        model = timm.create_model(model_name)
        calibrate(model, example_input(model, 8, device, seed=1))
    model.eval()
    with tempfile.TemporaryDirectory() as text:
        runners, sizes = vit_runners(vit_arguments, Path(text), args.threads)
        ours, our_sizes = our_runners(model, Path(text))
    runners, sizes = {**runners, **ours}, {**sizes, **our_sizes}
    parameters = {
        "ours": sum(p.numel() for p in model.parameters()),
        "ViT": sum(p.numel() for p in runners["ViT torch fp32"].parameters()),  # type: ignore[attr-defined]
    }
    parity = checked(runners, model, example_input(model, 2, device))
    row = {"row": name, "weights": args.checkpoint or "random, BatchNorm calibrated", "parameters": parameters}
    row |= {"megabytes": sizes, "parity": parity, "firing_rate": firing_rate(model, example_input(model, 4, device))}
    row["batches"] = {}
    for batch in args.batch:
        seconds = timed(runners, example_input(model, batch, device), args.rounds)
        row["batches"][batch] = {
            "pictures_per_second": {k: batch / statistics.median(s) for k, s in seconds.items()},
            "all_seconds": seconds,
        }
    return row


def printed(row: dict) -> str:
    batches = list(row["batches"])
    head = f"{'':34}" + "".join(f"{f'b{b} pictures/s':>16}" for b in batches) + f"{'MB':>9}"
    lines = [
        f"{row['row']}: firing rate {row['firing_rate']:.1%} ({row['weights']}), parameters {row['parameters']}",
        head,
    ]
    for name in row["megabytes"]:
        speeds = "".join(f"{row['batches'][b]['pictures_per_second'][name]:16.2f}" for b in batches)
        lines.append(f"{name:34}{speeds}{row['megabytes'][name]:9.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--checkpoint", help="a trained model of the (single) row, for a real firing rate")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    from benchmarks.machine import describe_machine

    torch.set_num_threads(args.threads)
    chosen = [name for name in ROWS if args.rows in name]
    if args.checkpoint and len(chosen) != 1:
        parser.error(f"--checkpoint belongs to one row, chosen are {', '.join(chosen)}: choose one with --rows")
    load = Path("/proc/loadavg")
    result = {**describe_machine(), "threads": args.threads, "rows": []}
    result["load_before"] = load.read_text().split()[0] if load.exists() else None
    for name in chosen:
        result["rows"].append(measured_row(name, args))
        print(printed(result["rows"][-1]), flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
