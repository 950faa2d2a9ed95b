"""Runs every file that export writes: `load_predictor(path)`."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from spikingformer.engine import Engine
from spikingformer.models import SpikingTransformer, StreamState
from spikingformer.neurons import use_backend
from spikingformer.training.checkpoint import named_file

from . import int8_file
from .checkpoint import is_checkpoint, load_checkpoint
from .extras import require
from .graphs import start_of_stream
from .metadata import ExportMetadata, file_kind
from .torch_file import is_aot_package
from .weights_file import load_weights

if TYPE_CHECKING:
    import onnxruntime

SUFFIXES = (".onnx", ".pt2", ".safetensors")
Program = Callable[..., Any]
State = TypeVar("State")


class Predictor(abc.ABC):
    """A model in a runtime: input to logits. `metadata` says how to prepare the input."""

    def __init__(self, metadata: ExportMetadata):
        self.metadata = metadata

    @abc.abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) or event frames (B, T, C, H, W), prepared, to logits (B, classes)."""

    def probabilities(self, x: Tensor) -> Tensor:
        """Softmax of the logits, (B, classes)."""
        return self.logits(x).softmax(-1)


class StepPredictor(Predictor, Generic[State]):
    """A model in a one-step form. `logits` feeds all steps of its input; `step` feeds one."""

    @abc.abstractmethod
    def step(self, frame: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One frame (B, C, H, W) and the state (None: at rest) to (logits so far (B, classes), next state)."""

    @abc.abstractmethod
    def reset_readout(self, state: State) -> State:
        """The state with its membranes kept and its readout at zero: later logits average over later frames only."""

    def logits(self, x: Tensor) -> Tensor:
        frames: Sequence[Tensor] = x.unbind(1) if x.ndim == 5 else [x] * self.metadata.time_steps
        state: State | None = None
        out: Tensor | None = None
        for frame in frames:
            out, state = self.step(frame, state)
        assert out is not None
        return out


class ModulePredictor(StepPredictor[StreamState]):
    """One of our modules, in eval mode: whole inputs in one call, streams with explicit state."""

    def __init__(self, model: SpikingTransformer, metadata: ExportMetadata):
        super().__init__(metadata)
        self.model = model.eval()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        _check_numbers(x)
        return self.model(x)

    @torch.no_grad()
    def step(self, frame: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        _check_numbers(frame)
        return self.model.stream(frame, state)

    def reset_readout(self, state: StreamState) -> StreamState:
        return replace(state, feature_sum=torch.zeros_like(state.feature_sum), steps=0)


class EnginePredictor(Predictor):
    """The compiled engine on spikes as bits, on the CPU."""

    def __init__(self, engine: Engine, metadata: ExportMetadata):
        super().__init__(metadata)
        self.engine = engine

    def logits(self, x: Tensor) -> Tensor:
        _check_numbers(x)
        return self.engine(x)


class OnnxPredictor(Predictor):
    """An ONNX file in ONNX Runtime on the CPU."""

    def __init__(self, session: "onnxruntime.InferenceSession", metadata: ExportMetadata):
        super().__init__(metadata)
        self.session = session

    def logits(self, x: Tensor) -> Tensor:
        _check_shape(x, self.session.get_inputs()[0].shape)
        (out,) = self.session.run(["logits"], {"input": _array(x)})
        return torch.from_numpy(out)


class GraphStepPredictor(StepPredictor[tuple[Tensor, ...]]):
    """A one-step graph of graphs.py. Its state is (steps, feature_sum, membrane of each neuron layer ...)."""

    def reset_readout(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        steps, feature_sum, *membranes = state
        return (torch.zeros_like(steps), torch.zeros_like(feature_sum), *membranes)


class OnnxStepPredictor(GraphStepPredictor):
    """A streaming ONNX file in ONNX Runtime on the CPU."""

    def __init__(self, session: "onnxruntime.InferenceSession", metadata: ExportMetadata):
        super().__init__(metadata)
        self.session = session
        self.names = [i.name for i in session.get_inputs()]

    def step(self, frame: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = self.session.get_inputs()
        _check_shape(frame, inputs[0].shape)
        if state is None:
            state = tuple(torch.zeros([len(frame) if isinstance(d, str) else d for d in i.shape]) for i in inputs[1:])
        arrays = (_array(frame), *(part.numpy() for part in state))
        outputs = ["logits", *(f"next.{name}" for name in self.names[1:])]
        logits, *after = map(torch.as_tensor, self.session.run(outputs, dict(zip(self.names, arrays, strict=True))))
        return logits, tuple(after)


class TorchPredictor(Predictor):
    """A torch.export program, or an AOTInductor package."""

    def __init__(self, program: Program, metadata: ExportMetadata):
        super().__init__(metadata)
        self.program = program

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        _check_shape(x, _input_shape(self.metadata))
        out = self.program(x.float())
        return out if isinstance(out, Tensor) else out[0]


class TorchStepPredictor(GraphStepPredictor):
    """A streaming torch.export program, or AOTInductor package."""

    def __init__(self, program: Program, metadata: ExportMetadata):
        super().__init__(metadata)
        self.program = program

    @torch.no_grad()
    def step(self, frame: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        _check_shape(frame, _input_shape(self.metadata))
        if state is None:
            with torch.device("meta"), use_backend("reference"):
                shapes = start_of_stream(self.metadata.create_model(), torch.empty_like(frame, device="meta"))
            state = tuple(torch.zeros(s.shape) for s in shapes)
        logits, *after = self.program(frame.float(), *state)
        return logits, tuple(after)


def load_predictor(path: str | Path, threads: int | None = None) -> Predictor:
    """The predictor for a file of `spikingformer export` (.onnx, .pt2, .safetensors), a checkpoint, the folder of a
    run, or MODEL.TAG of weights that come with the package.

    `threads`: for ONNX Runtime; default: as many as torch uses. Raises ValueError for a missing or damaged file, one of
    another kind, or a runtime that is not installed.
    """
    file = named_file(path)
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give a file written by `spikingformer export`")
    if file.suffix == ".onnx":
        session, metadata = _onnx_session(file, threads)
        return (OnnxStepPredictor if metadata.streaming else OnnxPredictor)(session, metadata)
    if file.suffix == ".pt2":
        program, metadata = _torch_program(file)
        return (TorchStepPredictor if metadata.streaming else TorchPredictor)(program, metadata)
    if file.suffix == ".safetensors":
        return _safetensors_predictor(file)
    if file.suffix == ".nir":
        raise ValueError(f"{file} is a NIR graph of a part of a model, which has no logits: give another format")
    raise ValueError(f"{file} is not in a format that can be run: expected {', '.join(SUFFIXES)}")


def _safetensors_predictor(file: Path) -> Predictor:
    if is_checkpoint(file):
        return ModulePredictor(*load_checkpoint(file))
    if file_kind(file) == int8_file.KIND:
        program, metadata = int8_file.load_int8(file)
        return EnginePredictor(Engine(program, "int8"), metadata)
    return ModulePredictor(*load_weights(file))


def _onnx_session(path: Path, threads: int | None) -> tuple["onnxruntime.InferenceSession", ExportMetadata]:
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base
        raise ValueError(f"{path} cannot be read as an ONNX model ({error}): export it again") from None
    return session, ExportMetadata.from_strings(session.get_modelmeta().custom_metadata_map, path)


def _torch_program(path: Path) -> tuple[Program, ExportMetadata]:
    if is_aot_package(path):
        package = torch._inductor.aoti_load_package(str(path.resolve()))
        return package, ExportMetadata.from_strings(package.get_metadata(), path)
    strings = dict.fromkeys(ExportMetadata.keys(), "")
    try:
        program = torch.export.load(str(path), extra_files=strings)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a torch.export program ({error}): export it again") from None
    found = {k: v for k, v in strings.items() if v or k.endswith("checkpoint_sha256")}
    return program.module(), ExportMetadata.from_strings(found, path)


def _input_shape(metadata: ExportMetadata) -> list[str | int]:
    """What the program takes, "batch" for the free size."""
    c = metadata.model_config()
    time = [metadata.time_steps] if metadata.input == "events" and not metadata.streaming else []
    return ["batch", *time, c.in_chans, *metadata.preprocessing.size]


def _check_numbers(x: Tensor) -> None:
    """Raises ValueError for NaN and infinity. Neurons would hide them: the predicted class would look normal."""
    if not x.isfinite().all():
        raise ValueError(f"the input {tuple(x.shape)} holds NaN or infinity: prepare it as the file's metadata says")


def _check_shape(x: Tensor, expected: Sequence[str | int]) -> None:
    """Raises ValueError if x does not have the shape that the file was exported for."""
    _check_numbers(x)
    fits = len(expected) == x.ndim and all(isinstance(e, str) or e == n for e, n in zip(expected, x.shape, strict=True))
    if not fits:
        wanted = ", ".join(map(str, expected))
        raise ValueError(
            f"this file takes inputs ({wanted}), got {tuple(x.shape)}: prepare the input as its metadata says, or "
            "export again with an example of that size"
        )


def _array(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.float().numpy())
