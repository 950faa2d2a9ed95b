"""The optimiser's step on a CUDA device, replayed as a graph where the gradients lie where they lay before."""

import logging
import warnings
from collections.abc import Callable

import torch

from spikingformer.data.upload import upload
from spikingformer.training.step_graph import capture_graph

_WARM_UP = 3  # steps with gradients in the same places before they are captured
_log = logging.getLogger("spikingformer")


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
        """Begins anew."""
        self._replay: Callable[[], None] | None = None
        self._places: tuple[int, ...] = ()
        self._seen = 0

    def __call__(self) -> None:
        groups = self._optimizer.param_groups
        floats = [group["lr"] for group in groups]
        self._rates.copy_(upload(torch.tensor(floats), self._rates.device), non_blocking=True)
        places = tuple(0 if p.grad is None else p.grad.data_ptr() for p in self._parameters)
        if self._replay is not None and places == self._places:
            self._replay()
            return
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            if self._replay is None and self._graph and self._is_settled(places):
                self._replay = self._try_to_capture()
            if self._replay is not None and places == self._places:
                self._replay()
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*capturable=True.*")  # steps before the graph
                    self._apply()
        finally:
            for group, number in zip(groups, floats, strict=True):
                group["lr"] = number

    def _is_settled(self, places: tuple[int, ...]) -> bool:
        self._seen = self._seen + 1 if places == self._places else 0
        self._places = places
        return self._seen >= _WARM_UP

    def _try_to_capture(self) -> Callable[[], None] | None:
        try:
            return self._capture(self._apply)[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an optimiser may do what a graph cannot hold
            self._graph = False
            _log.warning("the optimiser's step runs without a CUDA graph: %s", str(error).splitlines()[0])
            return None
