"""Running statistics of normalisation layers under micro-batches and several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Moves the running means and variances of a model once a step, by the mean over the step's micro-batches.

    Left alone, they would move with every micro-batch and differ between processes: what is learned would depend on
    who saw which one.

    Args:
        model: The model, in the mode in which it is trained; layers in evaluation mode keep their statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = (layer for layer in model.modules() if isinstance(layer, _NormBase) and layer.training)
        self._buffers = [
            buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None
        ]
        self._before = self._copies()
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers]

    def begin(self) -> None:
        """Begin a step."""
        self._before = self._copies()
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers]

    def collect(self) -> None:
        """Take what a micro-batch made of the statistics, and set them back."""
        for buffer, before, total in zip(self._buffers, self._before, self._sums, strict=True):
            total += buffer
            buffer.copy_(before)

    def apply(self, count: int, mean_over_processes: Callable[[Tensor], Tensor]) -> None:
        """End a step of ``count`` micro-batches in this process; a step that is left out does without."""
        if not self._buffers:
            return
        values = mean_over_processes(torch.cat(self._sums) / count)
        for buffer, value in zip(self._buffers, values.split([len(buffer) for buffer in self._buffers]), strict=True):
            buffer.copy_(value)

    def _copies(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._buffers]
