"""Networks that refine every cell of one quadtree level, instead of the incoherent nodes of all levels.

R RoIs, C channels, S side of the level.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from transfiner_refine.config import ROOT_SIDE, TransfinerConfig
from transfiner_refine.functional.quadtree import grid_nodes, node_centres, take_nodes
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.transfiner import (
    Detection,
    IncoherenceDetector,
    MaskTransfiner,
    SelectNodes,
    SequenceEncoder,
)
from transfiner_refine.types import LevelNodes

from .nodes import NodeMLP


class GridDetector(IncoherenceDetector):
    """The incoherence detector, trained as ever, whose nodes are all cells of one level.

    Args:
        config: The architecture.
        level: The level; calls of less depth take their finest.
    """

    def __init__(self, config: TransfinerConfig, level: int):
        super().__init__(config)
        self.level = level

    def forward(self, roi_pyramid: RoIPyramid, coarse: Sequence[Tensor], depth: int, select: SelectNodes) -> Detection:
        """Detect as :class:`IncoherenceDetector` does, then replace the quadtree."""
        detection = super().forward(roi_pyramid, coarse, depth, select)
        level = min(self.level, depth - 1)
        quadtree = [take_nodes(nodes, nodes.roi[:0]) for nodes in detection.quadtree]
        if quadtree:
            side = ROOT_SIDE << level
            roi, row, col = grid_nodes(detection.guidance.shape[0], side, detection.guidance.device)
            logits = torch.zeros_like(roi, dtype=torch.float32)
            quadtree[level] = LevelNodes(roi, row, col, torch.full_like(roi, -1), logits, side)
        return replace(detection, quadtree=tuple(quadtree))


class GridTransfiner(MaskTransfiner):
    """A refiner of all cells of one level.

    Args:
        config: The architecture.
        level: The level that is refined.
        network: Makes the network, from maps ``(R, C, S, S)`` to maps of the same shape.
    """

    def __init__(self, config: TransfinerConfig, level: int, network: Callable[[TransfinerConfig], nn.Module]):
        super().__init__(config)
        self.incoherence_detector = GridDetector(config, level)
        self.add_module("sequence_encoder", network(config))

    def refine_nodes(
        self,
        roi_pyramid: RoIPyramid,
        coarse: Sequence[Tensor],
        guidance: Tensor,
        quadtree: Sequence[LevelNodes],
        token_budget: int = 1 << 30,
    ) -> list[Tensor]:
        """Predict the refined label of every node; arguments and result as for the transformer.

        The network sees whole grids, also where training asks for some of their cells.
        """
        logits = [torch.zeros_like(nodes.logits) for nodes in quadtree]
        level = min(self.incoherence_detector.level, len(quadtree) - 1)
        nodes, rois, side = quadtree[level], guidance.shape[0], ROOT_SIDE << level
        for part in torch.arange(rois, device=guidance.device).split(max(1, token_budget // side**2)):
            place, row, col = grid_nodes(len(part), side, guidance.device)
            roi = part[place]
            probs = coarse[level][roi, row, col]
            centres = node_centres(row, col, side)
            tokens = self.node_encoder(roi_pyramid, guidance, probs, roi, centres, side, level)
            maps = tokens.unflatten(0, (len(part), side, side)).permute(0, 3, 1, 2)  # (r, C, S, S)
            tokens = self.sequence_encoder(maps).permute(0, 2, 3, 1).flatten(0, 2)
            decoded = self.pixel_decoder(tokens, probs).unflatten(0, (len(part), side, side))
            index = ((nodes.roi >= part[0]) & (nodes.roi <= part[-1])).nonzero()[:, 0]
            values = decoded[nodes.roi[index] - part[0], nodes.row[index], nodes.col[index]]
            logits[level] = logits[level].index_put((index,), values)
        return logits


class CellNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of ``(R, C, S, S)``."""

    def forward(self, input: Tensor) -> Tensor:
        """``(R, C, S, S)`` to the same shape."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GridCNN(nn.Module):
    """Residual 3×3 convolutions, one for each layer of the transformer, which have about as many weights."""

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        channels = config.channels
        self.layers = nn.ModuleList(
            nn.Sequential(CellNorm(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))
            for _ in range(config.layers)
        )
        self.norm = CellNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """``(R, C, S, S)`` to the same shape."""
        for layer in self.layers:
            maps = maps + layer(maps)
        return self.norm(maps)


class NonLocal(nn.Module):
    """The CNN and after it one non-local block, in its embedded Gaussian form.

    Wang, Girshick, Gupta, He, *Non-local Neural Networks*, CVPR 2018.
    """

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        channels, inner = config.channels, config.channels // 2
        self.cnn = GridCNN(config)
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """``(R, C, S, S)`` to the same shape."""
        maps = self.cnn(maps)
        q, k, v = (layer(maps).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        affinity = torch.softmax(q @ k.transpose(1, 2), dim=2)  # (R, S², S²)
        return maps + self.out((affinity @ v).transpose(1, 2).unflatten(2, maps.shape[2:]))


class GridTokens(nn.Module):
    """A network of tokens on all cells of a grid: the MLP on full regions, or the standard transformer.

    Args:
        network: Takes tokens, the sequence of each and their number.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, maps: Tensor) -> Tensor:
        """``(R, C, S, S)`` to the same shape."""
        rois, _, side, _ = maps.shape
        sequence = torch.arange(rois, device=maps.device).repeat_interleave(side * side)
        tokens = self.network(maps.permute(0, 2, 3, 1).flatten(0, 2), sequence, rois)
        return tokens.unflatten(0, (rois, side, side)).permute(0, 3, 1, 2)


def on_grid(kind: str, level: int) -> Callable[[TransfinerConfig], MaskTransfiner]:
    """A maker of refiners with the network ``kind`` on all cells of a level."""
    network = GRID_NETWORKS[kind]
    return lambda config: GridTransfiner(config, level, network)


GRID_NETWORKS: dict[str, Callable[[TransfinerConfig], nn.Module]] = {
    "cnn": GridCNN,
    "mlp": lambda config: GridTokens(NodeMLP(config)),
    "non_local": NonLocal,
    "transformer": lambda config: GridTokens(SequenceEncoder(config)),
}
