"""Calls of the kernels past torch's dispatcher, which in Python costs more than a small kernel takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Whether these are tensors in a CPU's memory and nothing but autograd has to see what is done with them.

    False in compilation, tracing and function transforms, under torch's modes (counters, fake tensors), and for tensors
    of other classes or whose memory is not what they stand for. A profiler sees plain calls under autograd's names.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not all(x is None or is_in_memory(x) for x in tensors)
    )


def is_in_memory(x: Tensor) -> bool:
    """Whether x is an ordinary tensor whose numbers lie in a CPU's memory as they are."""
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    return plain and not x.is_neg() and not x._is_zerotensor()


def _registered(
    library: torch.library.Library, name: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """The op `spikingformer::name`, defined in `library`, with its implementation and its form without data."""
    library.impl(name, run, "CPU")
    torch.library.register_fake(f"spikingformer::{name}", fake, lib=library)
    op: Callable[..., Any] = getattr(torch.ops.spikingformer, name)
    return op


def _past_the_dispatcher(op: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, whose implementation `run` is: a plain call runs it without the dispatcher."""

    def call(*args: Any) -> Any:
        plain = is_plain_call(*(x for x in args if isinstance(x, Tensor)))
        return (run if plain else op)(*args)

    return call


def register(
    library: torch.library.Library, name: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers `spikingformer::name`, whose implementation `run` is, without gradients; the op past the dispatcher."""
    return _past_the_dispatcher(_registered(library, name, run, fake), run)


def register_differentiable(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """`register` for an op with gradients."""
    op = _registered(library, name, run, fake)
    once = once_differentiable(gradients)  # a second derivative would be silently wrong
    torch.library.register_autograd(f"spikingformer::{name}", once, setup_context=setup_context, lib=library)

    class Direct(torch.autograd.Function):  # renamed below: graphs and profilers show it
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:  # a `setup_context` of the class would be slow: torch inspects it
            output = run(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return once(ctx, *grads)

    Direct.__name__ = Direct.__qualname__ = str(op)

    def run_with_gradients(*args: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        return Direct.apply(*args) if wanted else run(*args)

    return _past_the_dispatcher(op, run_with_gradients)
