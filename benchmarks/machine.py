"""What a result was measured on: as `spikingformer reproduce` writes it."""

from spikingformer.reproduce.evidence import describe_machine

__all__ = ["describe_machine"]
