"""Every kernel compiles for sm_90 (an H100 or H200) on a machine without a GPU.

Inside `compiling` every launch compiles its kernel for compute capability 9.0, with the arguments of that launch, and
stops there: nothing runs, outputs stay unwritten. Triton's own ptxas turns the PTX into a cubin.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spikingformer.neurons import SURROGATES, LIFConfig

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from spikingformer.neurons.triton import ops  # noqa: E402


class _AbsentGPU:
    """What a launch asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[dict[str, Any]]:
    """{kernel name: compiled kernel}, filled as launches come; nothing comes from Triton's cache on disk."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: the parity tests run on it")
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = str(tmp_path)
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", _AbsentGPU())
        yield kernels


def assert_for_sm90(kernels: dict[str, Any], *names: str) -> None:
    assert set(kernels) == set(names)
    for name, kernel in kernels.items():
        assert ".target sm_90" in kernel.asm["ptx"], name
        assert f".entry {name}" in kernel.asm["ptx"], name
        assert kernel.asm["cubin"][:4] == b"\x7fELF", name


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_lif(compiled, surrogate):
    x = torch.zeros(4, 256, dtype=torch.bfloat16, requires_grad=True)
    config = LIFConfig(tau=1.75, surrogate=surrogate, v_reset=None if surrogate == "atan" else 0.0)
    backward(*ops.lif(x, config, torch.zeros(256)))
    assert_for_sm90(compiled, "lif_forward", "lif_backward")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_wide_accesses(compiled, dtype):
    """A memory-bound kernel should move 16 bytes a thread and access."""
    backward(ops.lif(torch.zeros(4, 4096, dtype=dtype, requires_grad=True), LIFConfig(), want_membrane=False)[0])
    for kernel in compiled.values():
        assert "ld.global.v4.b32" in kernel.asm["ptx"]
        assert "st.global.v4.b32" in kernel.asm["ptx"]


STAGES = {
    "none": (None, False, False, ("stage_forward", "stage_backward")),
    "residual": (None, True, False, ("stage_forward", "stage_backward", "normalisation_backward")),
    "drop path": (None, True, True, ("stage_forward", "stage_backward", "normalisation_backward")),
    "cml": ("cml", False, False, ("pool_fire_forward", "pool_fire_backward", "normalisation_backward")),
    "sps": ("sps", False, False, ("fire_pool_forward", "stage_backward")),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage(compiled, stage):
    channels = 48
    pool, residual, scaled, names = STAGES[stage]
    y = torch.zeros(2, 2, channels, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(channels, requires_grad=True), torch.ones(channels, requires_grad=True)
    mean, rstd = ops.bn_statistics(y, torch.zeros(channels), torch.ones(channels))
    extra = torch.zeros_like(y).requires_grad_() if residual else None
    s, current = ops.bn_pool_lif(
        y,
        mean,
        rstd,
        weight,
        bias,
        LIFConfig(),
        pool=pool,
        residual=extra,
        scale=torch.ones(2) if scaled else None,
        batch_statistics=True,
        want_current=residual,
    )
    backward(s) if current is None else backward(s, current)
    assert_for_sm90(compiled, "channel_statistics", "combine_statistics", "combine_sums", *names)


@pytest.mark.parametrize(
    ("steps", "tokens", "width", "names"),
    [
        (2, 64, 32, ()),
        (16, 64, 16, ()),
        (2, 196, 96, ("attention_counts", "attention_backward_keys")),
    ],
    ids=["cifar-4-384", "dvs-2-256", "imagenet-8-768"],
)
def test_attention(compiled, steps, tokens, width, names):
    qkv = torch.zeros(steps, 1, tokens, 6 * width, dtype=torch.bfloat16, requires_grad=True)
    backward(ops.spike_attention_packed(qkv, 2, 0.125, LIFConfig(v_threshold=0.5)))
    assert_for_sm90(compiled, "attention_forward", "attention_backward", *names)
    assert all("wgmma" in kernel.asm["ptx"] for kernel in compiled.values()), "not on Hopper's matrix units"
