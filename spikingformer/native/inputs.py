"""What the C++ and the Triton kernels ask of their inputs: the layout in memory, and which stages there are."""

from collections.abc import Sequence

from torch import Tensor

POOLS = (None, "cml", "sps")  # of the stage between two products; see `bn_pool_lif`


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements of this shape and these strides fill one block of memory without holes or overlaps."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def channels_last(x: Tensor | None) -> Tensor | None:
    """x (T, B, C, H, W) itself where its memory is (T, B, H, W, C), else a copy that is."""
    return None if x is None else x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def check_stage(
    y: Tensor,
    pool: str | None,
    repeats: int,
    residual: Tensor | None,
    spike_residual: Tensor | None,
    other_extras: bool,
) -> None:
    """Raises ValueError for a combination of `bn_pool_lif`'s arguments that has no kernel.

    other_extras: whether something else was asked for that excludes a pool and repeats.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
    residuals = {"residual": residual, "spike_residual": spike_residual}
    extras = other_extras or any(r is not None for r in residuals.values())
    if extras and (pool is not None or repeats > 1):
        raise ValueError(
            "a residual, a scale or the current was asked for together with a pool or repeats: run them apart"
        )
    if repeats < 1 or (repeats > 1 and y.shape[0] != 1):
        raise ValueError(f"repeats needs y with T = 1, got T = {y.shape[0]} and repeats = {repeats}")
    for name, r in residuals.items():
        if r is not None and r.shape != y.shape:
            raise ValueError(f"{name} must have y's shape {tuple(y.shape)}, got {tuple(r.shape)}")
