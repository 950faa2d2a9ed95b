"""The optimiser's step on a CUDA device, replayed as a graph while the gradients keep their places in memory."""

import warnings
from collections.abc import Callable

import torch

from spikingformer.data.upload import upload
from spikingformer.training.step_graph import capture_graph, try_to_capture

_WARM_UP = 3  # steps with gradients in the same places before they are captured


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it can keep its state on the device."""
    return all("capturable" in group for group in optimizer.param_groups)


class DeviceUpdate:
    """Calls `apply`, which steps a capturable optimiser, with learning rates that are tensors on the device.

    The groups' rates stay floats outside a call. With `graph`, calls are captured once gradients keep their places, as
    those of a `StepGraph` do, and replayed while they do: the same numbers, without the launches. `forget` must follow
    whatever puts other tensors into the optimiser's state. `capture` stands in for `capture_graph` in tests.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        apply: Callable[[], None],
        device: torch.device,
        graph: bool,
        capture: Callable = capture_graph,
    ) -> None:
        self._optimizer, self._apply, self._capture, self._graph = optimizer, apply, capture, graph
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["capturable"] = True
        self._rates = torch.zeros(len(optimizer.param_groups), device=device)
        self.forget()

    def forget(self) -> None:
        """Forgets the graph and the gradients' places."""
        self._replay: Callable[[], None] | None = None
        self._captured: tuple[int, ...] = ()  # the gradients' places in the graph
        self._last: tuple[int, ...] = ()  # and in the step before
        self._seen = 0

    @property
    def holds_memory(self) -> bool:
        """Whether the optimiser's step was captured."""
        return self._replay is not None

    def __call__(self) -> None:
        groups = self._optimizer.param_groups
        floats = [group["lr"] for group in groups]
        self._rates.copy_(upload(torch.tensor(floats), self._rates.device), non_blocking=True)
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            replay = self._find_replay() if self._graph else None
            if replay is not None:
                replay()
                return
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*capturable=True.*")  # steps outside the graph
                self._apply()
        finally:
            for group, number in zip(groups, floats, strict=True):
                group["lr"] = number

    def _find_replay(self) -> Callable[[], None] | None:
        """The graph for the gradients' places, captured now if they have settled there."""
        places = tuple(0 if p.grad is None else p.grad.data_ptr() for p in self._parameters)
        self._seen = self._seen + 1 if places == self._last else 0
        self._last = places
        if self._replay is not None and places == self._captured:
            return self._replay
        if self._seen < _WARM_UP:
            return None
        self._replay = None  # frees its memory before the next one takes some
        found = try_to_capture(self._capture, self._apply, "the optimiser's step")
        if found is None:
            self._graph = False
            return None
        self._replay, self._captured = found[0], places
        return self._replay
