"""A differentiable count of synaptic operations, to train towards fewer of them."""

from types import TracebackType

import torch
from torch import Tensor, nn

from .facts import Kind
from .static import static_counts


class SparsityTerm:
    """Expected synaptic operations of the last forward pass, divided by those if every neuron fired.

        with SparsityTerm(model) as sparsity:
            loss = criterion(model(x), y) + weight * sparsity.value()

    The value lies in [0, 1] for spikes: each product layer's mean input, weighted by its products without padding;
    `value()` raises RuntimeError without a forward pass before it. Gradients reach the neurons through their
    surrogates. Calls without gradients are ignored. Layers that read analog input, and the products of attention
    (under 1 % of the published models' operations), are not counted. Call `value()` once per forward pass.

    `input_shape`: of one sample, for models that do not say it.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...] | None = None):
        facts = static_counts(model, input_shape)
        modules = dict(model.named_modules())
        products = [p for p in facts.products if p.weighted and p.kind < Kind.ANALOG]
        if not products:
            raise ValueError("no layer of the model reads spikes, so there is nothing to make sparse")
        total = sum(facts.per_sample(p, p.valid, True) for p in products)
        self._weights = {modules[p.name]: facts.per_sample(p, p.valid, True) / total for p in products}
        self._means: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():  # an evaluation in between does not count
            return
        self._means.append(
            args[0].mean(dtype=torch.promote_types(args[0].dtype, torch.float32)) * self._weights[module]
        )

    def __enter__(self) -> "SparsityTerm":
        self._handles = [module.register_forward_pre_hook(self._see) for module in self._weights]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._means = [], []

    def value(self) -> Tensor:
        """The term of the last forward pass, which is then cleared."""
        if not self._means:
            raise RuntimeError(
                "no forward pass with gradients was seen: call the model in the context, gradients on, before value()"
            )
        total, self._means = torch.stack(self._means).sum(), []
        return total
