"""What a result was measured on: as `spikingformer reproduce` writes it."""

from spikingformer.training.machine import describe_machine

__all__ = ["describe_machine"]
