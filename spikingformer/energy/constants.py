"""Energies of elementary operations, each with its source. pJ unless said otherwise."""

from dataclasses import dataclass

HOROWITZ = "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, 45 nm, 0.9 V"


@dataclass(frozen=True)
class Constant:
    """One number and where it comes from."""

    value: float
    unit: str
    source: str


CONSTANTS = {
    "fp32_add": Constant(0.9, "pJ", HOROWITZ),
    "fp32_mul": Constant(3.7, "pJ", HOROWITZ),
    "fp16_add": Constant(0.4, "pJ", HOROWITZ),
    "fp16_mul": Constant(1.1, "pJ", HOROWITZ),
    "int32_add": Constant(0.1, "pJ", HOROWITZ),
    "int32_mul": Constant(3.1, "pJ", HOROWITZ),
    "int8_add": Constant(0.03, "pJ", HOROWITZ),
    "int8_mul": Constant(0.2, "pJ", HOROWITZ),
    "sram_8kb": Constant(10.0, "pJ per 64-bit access", HOROWITZ),
    "sram_32kb": Constant(20.0, "pJ per 64-bit access", HOROWITZ),
    "sram_1mb": Constant(100.0, "pJ per 64-bit access", HOROWITZ),
    "dram": Constant(1300.0, "pJ per 64-bit access (the lower end of 1300-2600)", HOROWITZ),
}


def pj(name: str) -> float:
    """The value of a constant."""
    return CONSTANTS[name].value


def mac(precision: str) -> float:
    """A multiply-accumulate: one multiplication and one addition."""
    return pj(f"{precision}_mul") + pj(f"{precision}_add")


def ac(precision: str) -> float:
    """An accumulate: one addition."""
    return pj(f"{precision}_add")


FP32_MAC = 4.6  # 3.7 + 0.9, spelled out because the sum of the two floats is 4.6000000000000005
