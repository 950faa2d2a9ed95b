"""The option --device, the same in every command that has it."""

import argparse


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --device; `spikingformer.training.setup.choose_device` checks its value."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def refuse_other_than_cpu(device: str, why: str) -> None:
    """Raises ValueError, with the reason, where a device other than the CPU was asked for."""
    if device not in ("auto", "cpu"):
        raise ValueError(f"--device {device}: {why}")
