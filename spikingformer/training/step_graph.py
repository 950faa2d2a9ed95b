"""Forward and backward of a training step as one CUDA graph, replayed from then on.

A step of these models is hundreds of short kernels; one by one they take longer to launch than to run.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from spikingformer.layers.fused import is_unwatched, watches_calls

_WARM_UP = 3  # steps of one shape before it is captured: kernels get compiled and the libraries choose theirs
_log = logging.getLogger("spikingformer")

_Result = TypeVar("_Result")
Run = Callable[[Tensor, Tensor, float], Tensor]


def capture_graph(run: Callable[[], _Result]) -> tuple[Callable[[], None], _Result]:
    """Captures what `run` launches on a CUDA device: (replay, its result, which each replay overwrites)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may load data meanwhile
        out = run()
    return graph.replay, out


def try_to_capture(
    capture: Callable, run: Callable[[], _Result], what: str, undo: Callable[[], None] = lambda: None
) -> tuple[Callable[[], None], _Result] | None:
    """`capture(run)`, or None where a graph cannot hold what `run` does, or memory cannot hold the graph.

    Args:
        capture: `capture_graph`, or its stand-in in tests.
        what: runs without a graph then, as the warning says.
        undo: called after a failure, to drop what `run` has left behind.
    """
    try:
        return capture(run)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # outside the handler: the error's traceback, gone by now, held on to what the capture had allocated
    undo()
    torch.cuda.empty_cache()
    _log.warning("%s runs without a CUDA graph: %s. It is slower; its numbers are the same.", what, reason)
    return None


@dataclass
class _Captured:
    key: tuple
    inputs: Tensor
    targets: Tensor
    replay: Callable[[], None]
    loss: Tensor
    gradients: list[Tensor | None]


class StepGraph:
    """Calls `run(inputs, targets, weight)`, which returns a loss and leaves gradients in the model's parameters.

    The shape of most steps is captured after a few of them and replayed; others run as they are, like every step
    while hooks watch the model. Where the model's `time_steps` change, this starts over. Gradients must be None before
    a call. `capture` stands in for `capture_graph` in tests.
    """

    def __init__(self, run: Run, model: nn.Module, capture: Callable = capture_graph) -> None:
        self._run, self._model, self._capture = run, model, capture
        self._seen: Counter[tuple] = Counter()
        self._captured: _Captured | None = None
        self._time_steps: int | None = None  # of the model in the steps seen so far
        self._failed = False

    @property
    def holds_memory(self) -> bool:
        """Whether a step was captured."""
        return self._captured is not None

    def __call__(self, inputs: Tensor, targets: Tensor, weight: float) -> Tensor:
        key = (inputs.shape, inputs.stride(), inputs.dtype, targets.shape, targets.dtype, weight)
        if self._failed or watches_calls() or not all(is_unwatched(m) for m in self._model.modules()):
            return self._run(inputs, targets, weight)
        if self._time_steps != (time_steps := getattr(self._model, "time_steps", None)):
            self._captured, self._time_steps = None, time_steps
            self._seen.clear()
        if self._captured is None:
            if self._seen[key] < _WARM_UP:
                self._seen[key] += 1
                return self._run(inputs, targets, weight)
            self._captured = self._try_to_capture(key, inputs, targets, weight)
        if self._captured is None or self._captured.key != key:
            return self._run(inputs, targets, weight)
        return self._replay(self._captured, inputs, targets)

    def _try_to_capture(self, key: tuple, inputs: Tensor, targets: Tensor, weight: float) -> _Captured | None:
        own = torch.empty_like(inputs).copy_(inputs), torch.empty_like(targets).copy_(targets)
        found = try_to_capture(
            self._capture, lambda: self._run(*own, weight), "the training step", self._drop_gradients
        )
        if found is None:
            self._failed = True
            return None
        replay, loss = found
        return _Captured(key, *own, replay, loss, [p.grad for p in self._model.parameters()])

    def _drop_gradients(self) -> None:
        self._model.zero_grad(set_to_none=True)

    def _replay(self, captured: _Captured, inputs: Tensor, targets: Tensor) -> Tensor:
        captured.inputs.copy_(inputs)
        captured.targets.copy_(targets)
        captured.replay()
        for parameter, gradient in zip(self._model.parameters(), captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss.clone()  # the next replay overwrites it
