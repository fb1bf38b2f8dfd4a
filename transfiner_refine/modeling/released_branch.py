"""The mask branch of the released checkpoints, exactly as their code computes it at inference.

It differs from the paper and from :mod:`transfiner_refine.modeling.transfiner` in most details: one incoherence map of
28×28 serves all levels, each with a threshold of its own; nodes carry no context; the position is added to queries and
keys; propagation is bilinear. All instances are refined; the released code stopped after the first ten of a batch.

The flow of :meth:`ReleasedMaskBranch.forward`:

1. Coarse masks and incoherence maps, 28×28, dense, of all instances.
2. Groups of instances with sequences of similar length, under the token budget. Of each group:
3. Tokens: the 14×14 cells of the coarse crop and the nodes of 28, 56 and 112, pooled at those cells alone.
4. Sequence encoder and pixel decoder: a refined probability for each token.
5. Propagation: 28 → 56 → 112, upsampled bilinearly, then overwritten at the nodes.

N instances of a batch, C = 256 channels, K nodes or cells, T tokens, S side of a crop.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.config import REFERENCE_SIDE, ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.incoherence import dilate, double_nearest
from transfiner_refine.functional.quadtree import grid_nodes
from transfiner_refine.functional.sampling import FeatureTable
from transfiner_refine.modeling.released_layout import BRANCH_NAMES, translate
from transfiner_refine.modeling.released_pooling import CellPooler, pyramid_level
from transfiner_refine.types import FeaturePyramid

CHANNELS = 256
CLASSES = 80
HEADS = 4
STRIDES = (4, 8, 16, 32)
LEVELS = ((28, 1e-6), (56, 0.125), (112, 0.8))
"""Side of each quadtree level, and the incoherence from which one of its cells is a node."""

SIDE = LEVELS[-1][0]
TOKEN_BUDGET = 16384
SHORTEST_SHARE = 0.85
"""Least length of a sequence relative to the longest of its group; attention to padding costs as much as to tokens."""

INSTANCE_TOKENS = REFERENCE_SIDE**2 + ROOT_SIDE**2
"""What one instance counts in the dense first step, whose crops are 14×14 and 28×28."""


@dataclass(frozen=True)
class ReleasedMasks:
    """What the mask branch makes of the N instances of a batch.

    Attributes:
        coarse_logits: ``(N, 28, 28)`` float, coarse mask of the instance's class, box frame.
        incoherence: ``(N, 28, 28)`` float, probability of incoherence, box frame.
        probs: ``(N, 112, 112)`` float, refined mask probabilities, box frame.
        tokens: ``(M,)`` int64, sequence length of each refined instance: all N, or the first ``max_instances``.
    """

    coarse_logits: Tensor
    incoherence: Tensor
    probs: Tensor
    tokens: Tensor


def _tower(channels: Sequence[int], last_relu: bool = True) -> nn.Sequential:
    """3×3 convolutions, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[: None if last_relu else -1])


@dataclass(frozen=True)
class Sequences:
    """How T tokens, kept one sequence after the other, are padded to one length.

    Attributes:
        padded: ``(G, L)`` int64, token in each place of G padded sequences; padding repeats some token.
        mask: ``(G, 1, 1, L)`` bool, true for real tokens; None if nothing is padded.
    """

    padded: Tensor
    mask: Tensor | None

    @staticmethod
    def of(lengths: Tensor) -> "Sequences":
        """Lay out sequences of the given lengths, ``(G,)`` int64."""
        place = torch.arange(int(lengths.max()), device=lengths.device)
        start = lengths.cumsum(0) - lengths
        real = place < lengths[:, None]
        padded = torch.where(real, start[:, None] + place, 0)
        return Sequences(padded, None if bool(real.all()) else real[:, None, None])

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of each sequence to itself, ``(T, C)`` each: ``(T, C)``."""
        # (T, C) -> (G, heads, L, C / heads)
        q, k, v = (x[self.padded].unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (queries, keys, values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)  # (G, L, C)
        return out.flatten(0, 1) if self.mask is None else out[self.mask[:, 0, 0]]


class ReleasedLayer(nn.Module):
    """One layer of the sequence encoder: attention, then feed-forward, each with a layer norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.project = nn.Linear(CHANNELS, CHANNELS)
        self.norm_attention = nn.LayerNorm(CHANNELS)
        self.ffn = nn.Sequential(
            nn.Linear(CHANNELS, 8 * CHANNELS), nn.ReLU(inplace=True), nn.Linear(8 * CHANNELS, CHANNELS)
        )
        self.norm_ffn = nn.LayerNorm(CHANNELS)

    def forward(self, tokens: Tensor, position: Tensor, sequences: Sequences) -> Tensor:
        """Encode tokens ``(T, C)`` whose positions ``(T, C)`` only queries and keys see: ``(T, C)``."""
        weight, bias = self.qkv.weight, self.qkv.bias
        qk = F.linear(tokens + position, weight[: 2 * CHANNELS], bias[: 2 * CHANNELS])
        values = F.linear(tokens, weight[2 * CHANNELS :], bias[2 * CHANNELS :])
        attended = sequences.attend(qk[:, :CHANNELS], qk[:, CHANNELS:], values)
        tokens = self.norm_attention(self.project(attended).add_(tokens))
        return self.norm_ffn(self.ffn(tokens).add_(tokens))


class ReleasedMaskBranch(nn.Module):
    """The released mask branch: FPN features, boxes and classes in, coarse and refined masks out.

    Inference only: :meth:`forward` records no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.semantic_tower = _tower([CHANNELS] * 5, last_relu=False)
        self.coarse_tower = _tower([CHANNELS] * 5)
        self.coarse_upsample = nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2)
        self.coarse_classifier = nn.Conv2d(CHANNELS, CLASSES, 1)
        self.incoherence_tower = _tower([CHANNELS] * 4 + [CHANNELS // 2])
        self.incoherence_upsample = nn.ConvTranspose2d(CHANNELS // 2, CHANNELS // 2, 2, stride=2)
        self.incoherence_classifier = nn.Conv2d(CHANNELS // 2, 1, 1)
        self.node_encoder = nn.Linear(CHANNELS + 1, CHANNELS)
        self.sequence_encoder = nn.ModuleList(ReleasedLayer() for _ in range(3))
        self.pixel_decoder = nn.Sequential(
            nn.Linear(CHANNELS, CHANNELS), nn.ReLU(inplace=True), nn.Linear(CHANNELS, 1), nn.Sigmoid()
        )

    @classmethod
    def from_original(cls, state_dict: Mapping[str, Tensor]) -> "ReleasedMaskBranch":
        """Build the branch from tensors with their original names.

        Args:
            state_dict: The ``roi_heads.mask_head.*`` and ``roi_heads.mask_pooler.*`` tensors of a checkpoint; those
                that only training needs may be missing. Not modified, not shared.

        Raises:
            WeightsError: If a tensor is missing, unknown or of another shape.
        """
        with torch.device("meta"):
            branch = cls()
        weights, _ = translate(state_dict, branch.state_dict(), BRANCH_NAMES)
        branch.load_state_dict(weights, strict=True, assign=True)
        return branch.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        boxes: Sequence[Tensor],
        classes: Sequence[Tensor],
        max_instances: int | None = None,
        *,
        smooth: bool = False,
        token_budget: int = TOKEN_BUDGET,
    ) -> ReleasedMasks:
        """Predict and refine the masks of a batch.

        Args:
            features: p2 to p5, each ``(B, 256, H / s, W / s)`` for strides s of 4 to 32.
            boxes: For each image ``(N_b, 4)`` float xyxy, pixels of the network's input.
            classes: For each image ``(N_b,)`` int64, 0 to 79.
            max_instances: Instances of the batch that are refined, the first ones; the others' coarse masks are
                upsampled. None refines all; the released code stopped at 10.
            smooth: Whether to do as the authors' demo, which dilates the nodes of the finest level and blurs the
                refined masks.
            token_budget: Tokens held at once, which bounds memory. One instance is never split; it has 16,660 at most.

        Returns:
            The masks of all images' instances, in order.

        Raises:
            InvalidInputError: If features, boxes and classes do not fit each other, or a limit is out of range.

        Note:
            As in the released code, the step from 28 to 112 goes through 56 only if any refined instance of the batch
            has a node there. With trained weights one practically always has.
        """
        pyramid, rois, image, labels = _checked(features, boxes, classes)
        if token_budget < 1 or (max_instances is not None and max_instances < 0):
            raise InvalidInputError(
                "expected a token_budget of at least 1 and max_instances of at least 0 or None, "
                f"got {token_budget} and {max_instances}"
            )
        plain = CellPooler(FeatureTable.of(pyramid), rois, image)
        coarse_logits, incoherence = self._coarse_masks(plain, labels, max(1, token_budget // INSTANCE_TOKENS))
        coarse = coarse_logits.sigmoid()[:, None]  # (N, 1, 28, 28)
        count = rois.shape[0] if max_instances is None else min(max_instances, rois.shape[0])
        probs = F.interpolate(coarse, SIDE, mode="bilinear")[:, 0]  # (N, 112, 112)
        tokens = self._lengths(incoherence[:count], smooth)
        if count:
            p2, *coarser = pyramid.maps
            enhanced = FeaturePyramid((self.semantic_tower(p2).add_(p2), *coarser), STRIDES)
            poolers = (plain, CellPooler(FeatureTable.of(enhanced), rois, image))
            through_56 = bool((incoherence[:count] >= LEVELS[1][1]).any())
            for group in _groups(tokens, token_budget):
                refined = self._refine(poolers, coarse[group], incoherence[group], group, smooth, through_56)
                probs[group] = refined
        return ReleasedMasks(coarse_logits, incoherence, probs, tokens)

    def _coarse_masks(self, pooler: CellPooler, labels: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
        """Coarse logits of each instance's class and incoherence probabilities, ``(N, 28, 28)`` each."""
        coarse_logits = pooler.table.rows.new_empty((labels.shape[0], ROOT_SIDE, ROOT_SIDE))
        incoherence = torch.empty_like(coarse_logits)
        level = pyramid_level(pooler.rois)
        for part in torch.arange(labels.shape[0], device=labels.device).split(at_once):
            crop = pooler.crop(part, REFERENCE_SIDE, level)  # (n, C, 14, 14)
            hidden = self.coarse_tower(crop)
            unsure = self.incoherence_upsample(self.incoherence_tower(hidden + crop))
            incoherence[part] = self.incoherence_classifier(unsure)[:, 0].sigmoid()
            upsampled = F.relu_(self.coarse_upsample(hidden))  # (n, C, 28, 28)
            classifier = self.coarse_classifier
            weight, bias = classifier.weight[labels[part], :, 0, 0], classifier.bias
            assert bias is not None
            # One of 80 classes is wanted, a dot product per cell.
            logits = torch.bmm(weight[:, None], upsampled.flatten(2))[:, 0] + bias[labels[part], None]
            coarse_logits[part] = logits.view(-1, ROOT_SIDE, ROOT_SIDE)
        return coarse_logits, incoherence

    def _lengths(self, incoherence: Tensor, smooth: bool) -> Tensor:
        """Sequence lengths ``(M,)`` int64, without the nodes themselves."""
        lengths = torch.full_like(incoherence[:, 0, 0], REFERENCE_SIDE**2, dtype=torch.long)
        for level in range(len(LEVELS)):
            for start in range(0, lengths.shape[0], 256):
                part = slice(start, start + 256)
                lengths[part] += _nodes(incoherence[part], level, smooth).sum(dim=(1, 2))
        return lengths

    def _refine(
        self,
        poolers: tuple[CellPooler, CellPooler],
        coarse: Tensor,
        incoherence: Tensor,
        group: Tensor,
        smooth: bool,
        through_56: bool,
    ) -> Tensor:
        """Refine a group of instances, ``(G,)`` int64: ``(G, 112, 112)`` from coarse ``(G, 1, 28, 28)``."""
        plain, enhanced = poolers
        level = pyramid_level(plain.rois[group])
        cells = [grid_nodes(group.shape[0], REFERENCE_SIDE, group.device)]
        cells += [_nodes(incoherence, i, smooth).nonzero(as_tuple=True) for i in range(len(LEVELS))]
        sides = [REFERENCE_SIDE, *(side for side, _ in LEVELS)]
        tokens, positions = [], []
        for depth, (side, (instance, row, col)) in enumerate(zip(sides, cells, strict=True)):
            pooler = enhanced if depth else plain
            feature = pooler.cells(group[instance], row, col, side, level[instance] - depth)
            values = coarse if side == ROOT_SIDE else F.interpolate(coarse, side, mode="bilinear")
            cues = torch.cat([feature, values[instance, 0, row, col, None]], dim=1)
            tokens.append(self.node_encoder(cues))
            code = _sine_code(side, coarse)
            positions.append(torch.cat([code[row], code[col]], dim=1))
        # From all instances' tokens, level by level, to all levels' tokens, instance by instance.
        owner = torch.cat([instance for instance, _, _ in cells])
        order = torch.argsort(owner, stable=True)
        encoded, position = torch.cat(tokens)[order], torch.cat(positions)[order]
        sequences = Sequences.of(torch.bincount(owner, minlength=group.shape[0]))
        for layer in self.sequence_encoder:
            encoded = layer(encoded, position, sequences)
        decoded = torch.empty_like(encoded[:, 0]).index_put((order,), self.pixel_decoder(encoded)[:, 0])
        probs = decoded.split([instance.shape[0] for instance, _, _ in cells])[1:]
        return _propagate(coarse, cells[1:], probs, smooth, through_56)


def _propagate(
    coarse: Tensor,
    nodes: Sequence[tuple[Tensor, ...]],
    probs: Sequence[Tensor],
    smooth: bool,
    through_56: bool,
) -> Tensor:
    """Write the nodes' probabilities from coarse to fine: ``(G, 112, 112)`` from coarse ``(G, 1, 28, 28)``."""
    refined = coarse.clone()
    for (side, _), (instance, row, col), values in zip(LEVELS, nodes, probs, strict=True):
        if side == SIDE or (side > ROOT_SIDE and through_56):
            refined = F.interpolate(refined, side, mode="bilinear", align_corners=True)
        if instance.shape[0]:
            refined[instance, 0, row, col] = values
    return _blur(refined)[:, 0] if smooth else refined[:, 0]


def _nodes(incoherence: Tensor, level: int, smooth: bool) -> Tensor:
    """The nodes of a level as a map, ``(G, S, S)`` bool, from incoherence ``(G, 28, 28)``."""
    side, threshold = LEVELS[level]
    nodes = incoherence >= threshold
    for _ in range(level):
        nodes = double_nearest(nodes)
    return dilate(nodes) if smooth and side == SIDE else nodes


def _blur(probs: Tensor) -> Tensor:
    """Binomial blur of 7×7 cells over ``(G, 1, S, S)``; beyond the border lies zero."""
    row = torch.tensor([math.comb(6, i) / 64 for i in range(7)], dtype=probs.dtype, device=probs.device)
    return F.conv2d(probs, (row[:, None] * row)[None, None], padding=3)


def _sine_code(side: int, like: Tensor) -> Tensor:
    """DETR's normalised sine code of one axis: ``(side, C / 2)``, sines and cosines in turn."""
    turn = torch.arange(1, side + 1, device=like.device, dtype=torch.float32) / (side + 1e-6) * (2 * math.pi)
    channel = torch.arange(CHANNELS // 2, device=like.device, dtype=torch.float32)
    angle = turn[:, None] / 10000 ** (2 * (channel // 2) / (CHANNELS // 2))
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).to(like.dtype)


def _groups(lengths: Tensor, token_budget: int) -> Iterator[Tensor]:
    """Group instances by length, so that each group's padded sequences fit the budget; a longer one stands alone."""
    order = torch.argsort(lengths, descending=True, stable=True)
    longest_first = lengths[order].tolist()
    start = 0
    while start < len(longest_first):
        longest = longest_first[start]
        limit = start + max(1, token_budget // longest)
        stop = start + 1
        while stop < min(limit, len(longest_first)) and longest_first[stop] >= SHORTEST_SHARE * longest:
            stop += 1
        yield order[start:stop]
        start = stop


def _checked(
    features: Sequence[Tensor], boxes: Sequence[Tensor], classes: Sequence[Tensor]
) -> tuple[FeaturePyramid, Tensor, Tensor, Tensor]:
    """Check the input: the pyramid, boxes ``(N, 4)`` float32, image index ``(N,)`` and classes ``(N,)``."""
    pyramid = FeaturePyramid(tuple(features), STRIDES)
    if pyramid.channels != CHANNELS:
        raise InvalidInputError(
            f"expected maps of {CHANNELS} channels, got {pyramid.channels}: "
            "the released branch understands only the FPN that it was trained with"
        )
    counts = [tuple(b.shape) for b in boxes], [tuple(c.shape) for c in classes]
    if len(boxes) != pyramid.batch_size or counts[0] != [(*shape, 4) for shape in counts[1]]:
        raise InvalidInputError(
            f"expected for each of {pyramid.batch_size} images boxes (N, 4) and classes (N,), "
            f"got boxes {counts[0]} and classes {counts[1]}"
        )
    labels = torch.cat([c.reshape(-1).long() for c in classes])
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
        raise InvalidInputError(
            f"expected classes from 0 to {CLASSES - 1}, got {int(labels.min())} to {int(labels.max())}: "
            "they count COCO's 80 classes, not its category ids"
        )
    sizes = torch.tensor([len(b) for b in boxes], device=labels.device)
    image = torch.arange(len(boxes), device=labels.device).repeat_interleave(sizes)
    return pyramid, torch.cat([b.float() for b in boxes]), image, labels
