# ruff: noqa: RUF005, SIM108  (Triton joins tuples with +, and chooses pointers at compile time in a statement)
"""Multi-step LIF, one kernel per direction.

T: time steps, M: neurons. x, s and their gradients are [T, M] with any time stride (0: the same current at every
step); membranes are [M] float32. Forward reads x and writes s; backward reads x and grad_s, recomputes h and writes
grad_x: nothing else is kept.
"""

import triton
import triton.language as tl

from .neuron import carried_gradient, charge, charge_gradient, charges, fires, input_gradient, reset, rest


@triton.jit
def load_steps(ptr, offsets, stride, mask, STEPS: tl.constexpr):
    """STEPS float32 tiles as a tuple. All loads come before any use, so that they are in flight together."""
    tiles = ()
    for t in tl.static_range(STEPS):
        tile = tl.load(ptr + tl.cast(stride, tl.int64) * t + offsets, mask=mask, other=0.0)
        tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def lif_forward(
    x_ptr,
    v_ptr,  # membrane to start from, or None: at rest
    s_ptr,  # or None: only the last membrane is wanted
    v_last_ptr,  # or None
    M,
    x_stride,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < M
    xs = load_steps(x_ptr, offsets, x_stride, mask, STEPS)
    if v_ptr is None:
        v = rest([BLOCK], NEURON)
    else:
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
    for t in tl.static_range(STEPS):
        h = charge(v, xs[t], NEURON)
        fired = fires(h, NEURON)
        v = reset(h, fired, NEURON)
        if s_ptr is not None:
            s = fired.to(tl.float32).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + tl.cast(M, tl.int64) * t + offsets, s, mask=mask)
    if v_last_ptr is not None:
        tl.store(v_last_ptr + offsets, v, mask=mask)


@triton.jit
def lif_backward(
    x_ptr,
    v_ptr,  # as in lif_forward
    grad_s_ptr,
    grad_v_last_ptr,  # or None
    grad_x_ptr,
    grad_v_ptr,  # or None
    M,
    x_stride,
    grad_s_stride,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < M
    xs = load_steps(x_ptr, offsets, x_stride, mask, STEPS)
    grads = load_steps(grad_s_ptr, offsets, grad_s_stride, mask, STEPS)
    if v_ptr is None:
        v = rest([BLOCK], NEURON)
    else:
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
    hs = charges(v, xs, STEPS, NEURON)
    if grad_v_last_ptr is None:
        grad_v = tl.zeros([BLOCK], tl.float32)
    else:
        grad_v = tl.load(grad_v_last_ptr + offsets, mask=mask, other=0.0)
    for t in tl.static_range(STEPS - 1, -1, -1):
        grad_h = charge_gradient(hs[t], grads[t], grad_v, NEURON)
        grad_x = input_gradient(grad_h, NEURON)
        tl.store(grad_x_ptr + tl.cast(M, tl.int64) * t + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        grad_v = carried_gradient(grad_h, NEURON)
    if grad_v_ptr is not None:
        tl.store(grad_v_ptr + offsets, grad_v, mask=mask)
