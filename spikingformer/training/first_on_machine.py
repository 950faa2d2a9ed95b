"""Work that one process of a machine does for all of its processes, such as filling a cache."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from spikingformer.training.distributed import World, leave_group

_Result = TypeVar("_Result")


def first_on_machine(world: World, work: Callable[[], _Result]) -> _Result | None:
    """The first process of each machine does `work` and returns its result; the others wait for it and return None.

    Raises:
        ValueError: in every process, with the message of the first one that failed.
    """
    if world.size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # the run's own gives up after minutes
    assert isinstance(group, dist.ProcessGroup)  # every process is a member
    result, problem = None, None
    if world.local_rank == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = str(error)
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem, group=group)
    leave_group(group)
    first = next((text for text in problems if text is not None), None)
    if first is not None:
        raise ValueError(first)
    return result
