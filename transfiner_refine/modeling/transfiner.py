"""Mask Transfiner (CVPR 2022), top to bottom: incoherence detector, quadtree, node and sequence encoder, propagation.

R RoIs of a batch, C channels, S RoI side, K nodes of one level, T tokens of a sequence, D channels of the features.

The flow of :meth:`MaskTransfiner.forward`:

1. Sec. 3.4, RoI pyramid: features of every RoI at each quadtree level, sampled on demand.
2. Sec. 3.1, incoherence detector: dense at 28×28, then only at the children of incoherent nodes.
3. Sec. 3.2, quadtree: the nodes of all levels, linked to their parents.
4. Sec. 3.3, node encoder, sequence encoder, pixel decoder: all nodes of a RoI in one sequence.
5. Sec. 3.2, propagation: refined nodes are written and handed down, coarse to fine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.config import REFERENCE_SIDE, ROOT_SIDE, TransfinerConfig
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.coarse import coarse_levels, coarse_logits
from transfiner_refine.functional.position import sine_position
from transfiner_refine.functional.quadtree import (
    child_nodes,
    grid_nodes,
    length_groups,
    node_centres,
    propagate,
    propagate_corrections,
    rank_in_roi,
    reference_keys,
    take_nodes,
    tree_cells,
    tree_keys,
)
from transfiner_refine.functional.sampling import FeatureTable, RoIPyramid, bilinear_rows, weighted_rows
from transfiner_refine.modeling.context import WideContext
from transfiner_refine.types import FeaturePyramid, LevelNodes

SelectNodes = Callable[[int, LevelNodes], Tensor]
"""``(level, candidates) -> (K,) bool``: which candidate cells of a level become nodes."""


@dataclass(frozen=True)
class Detection:
    """What the incoherence detector found.

    Attributes:
        root_logits: ``(R, 28, 28)`` float, incoherence of level 0.
        candidates: Cells judged at each level: all at level 0, then the children of the nodes above.
        quadtree: The candidates chosen as nodes, linked to their parents, level by level.
        guidance: ``(R, C, 28, 28)`` float, the detector's features at level 0.
        estimate: ``(R, 28, 28)`` float logits, the detector's own guess of the whole mask, by which its wide context is
            trained; None without one, and outside of training.
    """

    root_logits: Tensor
    candidates: tuple[LevelNodes, ...]
    quadtree: tuple[LevelNodes, ...]
    guidance: Tensor
    estimate: Tensor | None = None


@dataclass(frozen=True)
class TransfinerOutput:
    """Refined RoIs.

    Attributes:
        probs: ``(R, S, S)`` float32, refined mask probabilities at the finest level.
        touched: ``(R, S, S)`` bool, cells whose value comes from a node or an ancestor of theirs.
        detection: What was found incoherent.
        node_probs: Refined probability of each node, level by level.
    """

    probs: Tensor
    touched: Tensor
    detection: Detection
    node_probs: tuple[Tensor, ...]


class IncoherenceDetector(nn.Module):
    """Finds the cells whose label is lost to low resolution, level by level (Sec. 3.1).

    The root level sees features and coarse mask through four 3×3 convolutions; each finer level fuses the feature
    sampled at a child with the features that judged its parent (lower-level guidance) by one 1×1 convolution.
    """

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        channels, inputs = config.channels, config.feature_channels + 1
        tower: list[nn.Module] = []
        for i in range(4):
            tower += [nn.Conv2d(inputs if i == 0 else channels, channels, 3, padding=1), nn.ReLU()]
        self.tower = nn.Sequential(*tower)
        self.context = WideContext(channels, config.context_scales) if config.context_scales else None
        self.estimate = nn.Conv2d(channels, 1, 1) if config.context_scales else None
        self.classifier = nn.Conv2d(channels, 1, 1)
        self.lower_level_guidance = config.lower_level_guidance
        finer = inputs + (channels if config.lower_level_guidance else 0)
        self.fusion = nn.ModuleList(nn.Linear(finer, channels) for _ in range(config.depth - 1))
        self.finer_classifier = nn.ModuleList(nn.Linear(channels, 1) for _ in range(config.depth - 1))
        for classifier in (self.classifier, *self.finer_classifier):
            # One cell in seven is incoherent: start there, or the first steps drown in false nodes.
            nn.init.constant_(classifier.bias, -math.log(6.0))  # type: ignore[arg-type]

    def guidance(self, features: Tensor, coarse: Tensor) -> Tensor:
        """The detector's features at level 0.

        Args:
            features: ``(R, D, 28, 28)``.
            coarse: ``(R, 28, 28)``, coarse probabilities.

        Returns:
            ``(R, C, 28, 28)``.
        """
        guidance = self.tower(torch.cat([features, coarse[:, None].to(features.dtype)], dim=1))
        return guidance if self.context is None else self.context(guidance)

    def forward(self, roi_pyramid: RoIPyramid, coarse: Sequence[Tensor], depth: int, select: SelectNodes) -> Detection:
        """Detect incoherent nodes from the root down.

        Args:
            roi_pyramid: Features of R RoIs.
            coarse: Coarse probabilities of each level, ``(R, S_l, S_l)``, coarsest first.
            depth: Levels to detect.
            select: Chooses the nodes among the candidates of each level.
        """
        guidance = self.guidance(roi_pyramid.grid(ROOT_SIDE, 0), coarse[0])  # (R, C, 28, 28)
        root_logits = self.classifier(guidance)[:, 0].float()  # (R, 28, 28)
        candidates: list[LevelNodes] = []
        quadtree: list[LevelNodes] = []
        hidden = guidance.permute(0, 2, 3, 1).flatten(0, 2)  # (R · 784, C), one row per candidate
        for level in range(depth):
            if level == 0:
                roi, row, col = grid_nodes(guidance.shape[0], ROOT_SIDE, guidance.device)
                cells = LevelNodes(roi, row, col, torch.full_like(roi, -1), root_logits.flatten(), ROOT_SIDE)
            else:
                side = ROOT_SIDE << level
                roi, row, col, parent = child_nodes(quadtree[-1])
                fine = roi_pyramid.sample(roi, node_centres(row, col, side), level)
                cues = [fine, coarse[level][roi, row, col, None].to(fine.dtype)]
                if self.lower_level_guidance:
                    cues.append(hidden[parent])
                hidden = F.relu(self.fusion[level - 1](torch.cat(cues, dim=1)))  # (4K, C)
                logits = self.finer_classifier[level - 1](hidden)[:, 0].float()
                cells = LevelNodes(roi, row, col, parent, logits, side)
            keep = select(level, cells).nonzero()[:, 0]
            candidates.append(cells)
            quadtree.append(take_nodes(cells, keep))
            hidden = hidden[keep]
        estimate = None
        if self.estimate is not None and self.training:
            estimate = self.estimate(guidance)[:, 0].float() + coarse_logits(coarse[0])
        return Detection(root_logits, tuple(candidates), tuple(quadtree), guidance, estimate)


class NodeEncoder(nn.Module):
    """Turns a node's cues into its token (Sec. 3.3): fine feature, coarse mask, 3×3 context, position.

    The neighbourhood goes through a fully connected layer and a ReLU; then one layer fuses, in this order, the fine
    feature, the context, the coarse probability and the guidance. The position is added to what comes out.
    """

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        self.cues = frozenset(config.node_cues)
        features, channels = config.feature_channels, config.channels
        width = 0
        if "fine" in self.cues:
            width += features
        if "coarse" in self.cues:
            width += 1
        if "context" in self.cues:
            self.context = nn.Linear(9 * features, channels)
            width += channels
        if "guidance" in self.cues:
            width += channels
        self.fuse = nn.Linear(width, channels)
        # The reference grid comes first, then the quadtree levels.
        self.level = nn.Embedding(config.depth + 1, channels) if config.level_embedding else None

    def forward(
        self,
        roi_pyramid: RoIPyramid,
        guidance: Tensor,
        coarse: Tensor,
        roi: Tensor,
        centres: Tensor,
        side: int,
        level: int,
    ) -> Tensor:
        """Encode the cells of one level.

        Args:
            roi_pyramid: Features of R RoIs.
            guidance: ``(R, C, 28, 28)``, the incoherence detector's features.
            coarse: ``(K,)`` float, coarse probability of each cell.
            roi: ``(K,)`` int64.
            centres: ``(K, 2)`` float32, relative to the RoI.
            side: Side of the cells' level.
            level: Quadtree level, or -1 for the reference grid, which shares the root's map.

        Returns:
            ``(K, C)`` tokens.
        """
        quadtree_level = max(level, 0)
        dtype = self.fuse.weight.dtype
        parts: list[Tensor] = []
        if "context" in self.cues:
            around = roi_pyramid.sample_context(roi, centres, side, quadtree_level)  # (K, 9, D)
            if "fine" in self.cues:
                parts.append(around[:, 4])  # the centre of the neighbourhood is the node itself
            parts.append(F.relu(self.context(around.flatten(1))))
        elif "fine" in self.cues:
            parts.append(roi_pyramid.sample(roi, centres, quadtree_level))
        if "coarse" in self.cues:
            parts.append(coarse[:, None].to(dtype))
        if "guidance" in self.cues:
            xy = centres * ROOT_SIDE - 0.5
            cells, weights = bilinear_rows(xy[:, 0], xy[:, 1], ROOT_SIDE, ROOT_SIDE)
            table = guidance.permute(0, 2, 3, 1).flatten(0, 2)
            parts.append(weighted_rows(table, cells + (roi * ROOT_SIDE**2)[:, None], weights))
        tokens = self.fuse(torch.cat(parts, dim=1))
        if "position" in self.cues:
            tokens = tokens + sine_position(centres, tokens.shape[1]).to(dtype)
        if self.level is not None:
            tokens = tokens + self.level.weight[level + 1]
        return tokens


@dataclass(frozen=True)
class SharedKeys:
    """Which tokens of a sequence are one key together: their mean takes part in attention, instead of each of them.

    Attributes:
        slot: ``(B, T)`` int64, the key of each token, below ``size``; any for padding.
        weight: ``(B, T)``, one over the number of tokens of its key; 0 for padding.
        size: Keys G of the longest sequence.
    """

    slot: Tensor
    weight: Tensor
    size: int

    @classmethod
    def of(cls, slot: Tensor, is_token: Tensor, size: int, dtype: torch.dtype) -> tuple["SharedKeys", Tensor]:
        """Share keys.

        Args:
            slot: As in the result.
            is_token: ``(B, T)`` bool, false for padding.
            size: As in the result.
            dtype: Of the weights.

        Returns:
            The keys, and which are there: ``(B, 1, 1, G)`` bool.
        """
        one = is_token.to(dtype)
        members = one.new_zeros((slot.shape[0], size)).scatter_add(1, slot, one)  # (B, G)
        weight = one / members.gather(1, slot).clamp(min=1)
        return cls(slot, weight, size), (members > 0)[:, None, None]

    def mean(self, tokens: Tensor) -> Tensor:
        """Mean of each key's tokens, ``(B, T, C)`` to ``(B, G, C)``; zeros for keys that are not there."""
        batch, _, channels = tokens.shape
        row = self.slot + torch.arange(batch, device=tokens.device)[:, None] * self.size  # (B, T)
        shares = (tokens * self.weight[..., None]).flatten(0, 1)
        row = row.flatten()[:, None].expand_as(shares)
        # Not index_add: where rows repeat, onnxruntime's threads overwrite one another's sums.
        means = shares.new_zeros((batch * self.size, channels)).scatter_add(0, row, shares)
        return means.unflatten(0, (batch, self.size))


class SequenceLayer(nn.Module):
    """One layer of the sequence encoder: self-attention and feed-forward, each behind a layer norm."""

    def __init__(self, channels: int, heads: int, ffn_channels: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.norm_ffn = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn_channels), nn.ReLU(), nn.Linear(ffn_channels, channels))

    def queries_keys_values(self, tokens: Tensor, keys: SharedKeys | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is made of, ``(B, h, T, C/h)``, and ``(B, h, G, C/h)`` for shared keys and their values."""
        tokens = self.norm_attention(tokens)
        if keys is None:
            qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # (B, T, 3, h, C/h)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            return q, k, v
        # The key of a mean is the mean of the keys, as the layer is linear: so few have to be computed.
        channels = tokens.shape[2]
        query, others = self.qkv.weight.split([channels, 2 * channels])
        query_bias, others_bias = self.qkv.bias.split([channels, 2 * channels])
        q = F.linear(tokens, query, query_bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
        kv = F.linear(keys.mean(tokens), others, others_bias).unflatten(2, (2, self.heads, -1))  # (B, G, 2, h, C/h)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, tokens: Tensor, mask: Tensor | None, keys: SharedKeys | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            tokens: ``(B, T, C)``, B sequences padded to one length.
            mask: ``(B, 1, 1, T)`` bool, true for real tokens, or ``(B, 1, 1, G)`` for the keys that are there; None if
                nothing is padded.
            keys: Keys that tokens share; None for a key of each token's own.
        """
        q, k, v = self.queries_keys_values(tokens, keys)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # (B, T, C)
        tokens = tokens + self.project(attended)
        return tokens + self.ffn(self.norm_ffn(tokens))


class SequenceEncoder(nn.Module):
    """Self-attention over all nodes of a RoI and its coarse reference tokens (Sec. 3.3)."""

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            SequenceLayer(config.channels, config.heads, config.ffn_channels) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.channels)

    def forward(self, tokens: Tensor, sequence: Tensor, count: int, key: Tensor | None = None) -> Tensor:
        """Encode sequences of unequal length.

        Args:
            tokens: ``(T, C)`` tokens of all sequences, in any order.
            sequence: ``(T,)`` int64, which sequence each belongs to.
            count: Number of sequences; each has at least one token.
            key: ``(T,)`` int64, the key of its sequence that each token is part of, counted from 0; None for a key of
                each token's own.

        Returns:
            ``(T, C)``, in the order of ``tokens``.
        """
        if tokens.shape[0] == 0:
            return tokens
        lengths = torch.bincount(sequence, minlength=count)
        slot = rank_in_roi(sequence)
        longest = int(lengths.max())
        padded = tokens.new_zeros((count, longest, tokens.shape[1])).index_put((sequence, slot), tokens)
        mask, keys = None, None
        is_token = torch.arange(longest, device=tokens.device) < lengths[:, None]  # (B, T)
        if key is not None:
            slots = key.new_zeros((count, longest)).index_put((sequence, slot), key)
            keys, mask = SharedKeys.of(slots, is_token, int(key.max()) + 1, padded.dtype)
        elif int(lengths.min()) < longest:
            mask = is_token[:, None, None]
        for layer in self.layers:
            padded = layer(padded, mask, keys)
        return self.norm(padded[sequence, slot])


class PixelDecoder(nn.Module):
    """Two-layer MLP from an encoded node to the logit of its refined label (Sec. 3.3)."""

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        self.residual = config.decoder == "residual"
        self.layers = nn.Sequential(
            nn.Linear(config.channels, config.channels), nn.ReLU(), nn.Linear(config.channels, 1)
        )
        if self.residual:
            nn.init.zeros_(self.layers[2].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.layers[2].bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, coarse: Tensor) -> Tensor:
        """Decode tokens ``(K, C)`` with coarse probabilities ``(K,)`` to logits ``(K,)`` float32."""
        logits = self.layers(tokens)[:, 0].float()
        return logits + coarse_logits(coarse) if self.residual else logits


class MaskTransfiner(nn.Module):
    """The refiner's network: features, RoIs and coarse masks in, refined masks out."""

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        self.config = config
        self.incoherence_detector = IncoherenceDetector(config)
        self.node_encoder = NodeEncoder(config)
        self.sequence_encoder = SequenceEncoder(config)
        self.pixel_decoder = PixelDecoder(config)

    def roi_pyramid(self, features: FeaturePyramid | FeatureTable, rois: Tensor, image: Tensor) -> RoIPyramid:
        """The RoIs' features at each quadtree level, sampled on demand (Sec. 3.4).

        Args:
            features: Features of the batch; the table of a pyramid that serves several groups of RoIs is made once.
            rois: ``(R, 4)`` float32, xyxy, network frame.
            image: ``(R,)`` int64, image of the batch.
        """
        return RoIPyramid.of(features, rois, image, self.config.canonical_level)

    def forward(
        self,
        roi_pyramid: RoIPyramid,
        coarse: Tensor,
        depth: int,
        select: SelectNodes,
        token_budget: int = 1 << 30,
    ) -> TransfinerOutput:
        """Refine R RoIs.

        Args:
            roi_pyramid: Features of the RoIs.
            coarse: ``(R, S, S)`` float32 coarse probabilities at the finest level, ``S = 28 · 2^(depth - 1)``.
            depth: Quadtree levels to refine, at most the configured depth.
            select: Chooses the nodes; see :func:`above_threshold`.
            token_budget: Tokens encoded at once; sequences are grouped by length to fit.

        Raises:
            InvalidInputError: If ``depth`` exceeds the model's or ``coarse`` has another side.
        """
        if depth > self.config.depth:
            raise InvalidInputError(
                f"expected a depth of at most {self.config.depth}, the model's, got {depth}: choose a deeper model"
            )
        side = ROOT_SIDE << max(depth - 1, 0)
        if coarse.shape[1:] != (side, side):
            raise InvalidInputError(f"expected coarse masks of side {side} for depth {depth}, got {coarse.shape[1:]}")
        levels = coarse_levels(coarse, depth)
        detection = self.incoherence_detector(roi_pyramid, levels, depth, select)
        logits = self.refine_nodes(roi_pyramid, levels, detection.guidance, detection.quadtree, token_budget)
        probs = tuple(torch.sigmoid(x) for x in logits)
        if self.config.decoder == "residual":
            bases = [coarse_logits(x) for x in levels]
            corrected, touched = propagate_corrections(bases, detection.quadtree, logits, self.config.propagate)
            refined = torch.where(touched, torch.sigmoid(corrected), coarse)
        else:
            refined, touched = propagate(levels, detection.quadtree, probs, self.config.propagate)
        return TransfinerOutput(refined, touched, detection, probs)

    def refine_nodes(
        self,
        roi_pyramid: RoIPyramid,
        coarse: Sequence[Tensor],
        guidance: Tensor,
        quadtree: Sequence[LevelNodes],
        token_budget: int = 1 << 30,
    ) -> list[Tensor]:
        """Predict the refined label of every node (Sec. 3.3).

        Args:
            roi_pyramid: Features of R RoIs.
            coarse: Coarse probabilities of each level, coarsest first.
            guidance: ``(R, C, 28, 28)``, the incoherence detector's features.
            quadtree: Nodes of each level.
            token_budget: Tokens encoded at once.

        Returns:
            Logits of each level's nodes, ``(K_l,)`` float32.
        """
        if not self.config.joint_levels and len(quadtree) > 1:
            logits: list[Tensor] = []
            for level in range(len(quadtree)):
                empty = [take_nodes(n, n.roi.new_zeros(0)) for n in quadtree]
                empty[level] = quadtree[level]
                logits.append(self._refine_joint(roi_pyramid, coarse, guidance, empty, token_budget)[level])
            return logits
        return self._refine_joint(roi_pyramid, coarse, guidance, quadtree, token_budget)

    def _refine_joint(
        self,
        roi_pyramid: RoIPyramid,
        coarse: Sequence[Tensor],
        guidance: Tensor,
        quadtree: Sequence[LevelNodes],
        token_budget: int,
    ) -> list[Tensor]:
        device = guidance.device
        logits = [torch.zeros(n.roi.shape[0], dtype=torch.float32, device=device) for n in quadtree]
        for chunk in length_groups(quadtree, guidance.shape[0], token_budget):
            place = torch.full((guidance.shape[0],), -1, dtype=torch.long, device=device)
            place[chunk] = torch.arange(chunk.shape[0], device=device)
            encoded, sequences, coarse_of_nodes, nodes_of_level, trees = [], [], [], [], []
            # The 14×14 reference tokens of each RoI head its sequence.
            cell_roi, row, col = grid_nodes(chunk.shape[0], REFERENCE_SIDE, device)
            reference = F.avg_pool2d(coarse[0][chunk][:, None], ROOT_SIDE // REFERENCE_SIDE).flatten()
            centres = node_centres(row, col, REFERENCE_SIDE)
            encoded.append(
                self.node_encoder(roi_pyramid, guidance, reference, chunk[cell_roi], centres, REFERENCE_SIDE, -1)
            )
            sequences.append(cell_roi)
            for level, nodes in enumerate(quadtree):
                index = (place[nodes.roi] >= 0).nonzero()[:, 0]
                roi, row, col = nodes.roi[index], nodes.row[index], nodes.col[index]
                probs = coarse[level][roi, row, col]
                centres = node_centres(row, col, nodes.side)
                encoded.append(self.node_encoder(roi_pyramid, guidance, probs, roi, centres, nodes.side, level))
                sequences.append(place[roi])
                coarse_of_nodes.append(probs)
                nodes_of_level.append(index)
                trees.append(tree_cells(row, col, level))
            sequence, keys = torch.cat(sequences), ()
            if self.config.tree_keys:
                grid = reference_keys(chunk.shape[0], device)
                keys = (torch.cat([grid, tree_keys(sequence[len(grid) :], torch.cat(trees), chunk.shape[0])]),)
            tokens = self.sequence_encoder(torch.cat(encoded), sequence, chunk.shape[0], *keys)
            decoded = self.pixel_decoder(tokens[cell_roi.shape[0] :], torch.cat(coarse_of_nodes))
            for level, (index, values) in enumerate(
                zip(nodes_of_level, decoded.split([len(i) for i in nodes_of_level]), strict=True)
            ):
                logits[level] = logits[level].index_put((index,), values)
        return logits


def above_threshold(threshold: float, max_nodes: int | None = None, depth: Tensor | None = None) -> SelectNodes:
    """Select the candidates that are incoherent with more than the given probability.

    Args:
        threshold: Probability of incoherence (paper: 0.5).
        max_nodes: Nodes kept per RoI and level, the most incoherent first; None keeps all.
        depth: ``(R,)`` int64, levels in which a RoI may have nodes; None for all.
    """

    def select(level: int, candidates: LevelNodes) -> Tensor:
        keep = torch.sigmoid(candidates.logits) > threshold
        if depth is not None:
            keep &= depth[candidates.roi] > level
        if max_nodes is not None:
            keep &= rank_in_roi(candidates.roi, candidates.logits) < max_nodes
        return keep

    return select
