"""Work that the processes of a run share out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_shared(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to items, of which each process takes its share; to be called by all of them.

    Args:
        function: Gives what can be pickled.
        items: The same in every process.

    Returns:
        The results in the order of the items, the same in every process.
    """
    rank, processes = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts = [function(item) for item in items[rank::processes]]
    if processes == 1:
        return parts
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, parts)
    return [gathered[i % processes][i // processes] for i in range(len(items))]
