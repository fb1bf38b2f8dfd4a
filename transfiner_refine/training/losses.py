"""The training objective (Mask Transfiner, Sec. 3.4, Eq. 2), and the module that computes it from images.

R RoIs, K nodes of one level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.functional.coarse import coarse_levels
from transfiner_refine.functional.quadtree import rank_in_roi, take_nodes
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.transfiner import MaskTransfiner
from transfiner_refine.training.targets import Targets, make_targets
from transfiner_refine.types import FeaturePyramid, LevelNodes


@dataclass(frozen=True)
class LossConfig:
    """Weights and sampling of the objective.

    Attributes:
        refine_weight: Weight of the L1 loss of refined nodes (Eq. 2: 1).
        incoherence_weight: Weight of the binary cross-entropy of the incoherence detector (Eq. 2: 0.5).
        cross_entropy_weight: Weight of an added cross-entropy of refined nodes; the paper has none. L1 through a
            sigmoid hardly moves a node that is wrong with confidence, which is what a binary coarse mask makes.
        estimate_weight: Weight of an added cross-entropy of the detector's guess of the whole mask, where the model has
            a wide context. It teaches that context what is object and what is background everywhere, not at nodes only.
        nodes_per_level: Range from which each step draws how many nodes of a RoI and level are refined; the paper
            has always 100. A range shows the attention sequences of many lengths.
        incoherence_threshold: Probability above which a predicted cell becomes a node, as in inference.
    """

    refine_weight: float = 1.0
    incoherence_weight: float = 0.5
    cross_entropy_weight: float = 0.0
    estimate_weight: float = 0.5
    nodes_per_level: tuple[int, int] = (100, 100)
    incoherence_threshold: float = 0.5


def refinement_losses(
    transfiner: MaskTransfiner,
    roi_pyramid: RoIPyramid,
    coarse: Tensor,
    truth: Tensor,
    weight: Tensor,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Losses of the refinement of R RoIs (Eq. 2), whatever made their features; R may be 0, and the depth too.

    Args:
        transfiner: The paper's network.
        roi_pyramid: Features of the RoIs.
        coarse: ``(R, S, S)`` float32 coarse probabilities at the finest level, RoI frame.
        truth: ``(R, 2S, 2S)`` bool, RoI frame.
        weight: ``(R,)`` float32, weight of each object.
        config: Weights and sampling.

    Returns:
        ``loss_refine``, ``loss_incoherence`` (weighted scalars to be summed), ``loss_cross_entropy`` and
        ``loss_estimate`` if ``config`` asks for them, and without gradient ``recall`` and ``precision`` of the root
        detector, ``wrong_before`` and ``wrong_after``, the shares of refined nodes with a wrong label.
    """
    depth = transfiner.config.depth
    levels = coarse_levels(coarse, depth)
    targets = make_targets(truth, levels)
    threshold = torch.logit(torch.tensor(config.incoherence_threshold))

    def select(level: int, candidates: LevelNodes) -> Tensor:
        # True nodes, so that every level is trained from the start, and those that inference would take.
        wanted = targets.incoherent[level][candidates.roi, candidates.row, candidates.col]
        return wanted | (candidates.logits.detach() > threshold)

    detection = transfiner.incoherence_detector(roi_pyramid, levels, depth, select)
    incoherence = _incoherence(detection.candidates, targets, weight)

    quota = int(torch.randint(config.nodes_per_level[0], config.nodes_per_level[1] + 1, ()))
    sampled = [sample_nodes(nodes, quota) for nodes in detection.quadtree]
    logits = transfiner.refine_nodes(roi_pyramid, levels, detection.guidance, sampled)
    none = weight.new_zeros(0)  # depth 0 has no level
    label = torch.cat([none, *(c[n.roi, n.row, n.col] for c, n in zip(targets.coverage, sampled, strict=False))])
    before = torch.cat([none, *(c[n.roi, n.row, n.col] for c, n in zip(levels, sampled, strict=False))])
    node_weight = torch.cat([none, *(weight[n.roi] for n in sampled)])
    after = torch.cat([none, *logits])
    total = node_weight.sum().clamp(min=1e-6)
    refine = (node_weight * (torch.sigmoid(after) - label).abs()).sum() / total
    losses = {"loss_refine": config.refine_weight * refine}
    if config.cross_entropy_weight:
        entropy = F.binary_cross_entropy_with_logits(after, label, reduction="none")
        losses["loss_cross_entropy"] = config.cross_entropy_weight * (node_weight * entropy).sum() / total
    losses["loss_incoherence"] = config.incoherence_weight * incoherence
    if detection.estimate is not None and config.estimate_weight:
        guess = F.binary_cross_entropy_with_logits(detection.estimate, targets.coverage[0], reduction="none")
        losses["loss_estimate"] = (
            config.estimate_weight * (weight * guess.mean(dim=(1, 2))).sum() / weight.sum().clamp(min=1e-6)
        )
    with torch.no_grad():
        found = detection.root_logits > threshold
        wanted = targets.incoherent[0]
        hits = (found & wanted).sum()
        losses["recall"] = hits / wanted.sum().clamp(min=1)
        losses["precision"] = hits / found.sum().clamp(min=1)
        count = max(1, label.numel())
        losses["wrong_before"] = ((before >= 0.5) != (label >= 0.5)).sum() / count
        losses["wrong_after"] = ((after >= 0) != (label >= 0.5)).sum() / count
    return losses


def _incoherence(candidates: Sequence[LevelNodes], targets: Targets, weight: Tensor) -> Tensor:
    """Mean over levels of the cross-entropy over each level's candidates; zero without a level."""
    losses = []
    for level, cells in enumerate(candidates):
        wanted = targets.incoherent[level][cells.roi, cells.row, cells.col].float()
        entropy = F.binary_cross_entropy_with_logits(cells.logits, wanted, reduction="none")
        cell_weight = weight[cells.roi]
        losses.append((cell_weight * entropy).sum() / cell_weight.sum().clamp(min=1e-6))
    return torch.stack(losses).mean() if losses else weight.new_zeros(())


class RefinementLoss(nn.Module):
    """The model with its objective: images, RoIs, coarse masks and ground truth in, losses out."""

    def __init__(self, model: RefinerModel, config: LossConfig):
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, image: Tensor, roi: Tensor, coarse: Tensor, truth: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Losses of a batch of crops with one object each.

        Args:
            image: ``(R, 3, H, W)`` uint8 RGB.
            roi: ``(R, 4)`` float32, xyxy, crop pixels.
            coarse: ``(R, S, S)`` float32 coarse probabilities at the finest level, RoI frame.
            truth: ``(R, 2S, 2S)`` bool, RoI frame.
            weight: ``(R,)`` float32, weight of each object.

        Returns:
            See :func:`refinement_losses`.
        """
        return self.of_features(self.model.encode_crops(image), roi, coarse, truth, weight)

    def of_features(
        self, pyramid: FeaturePyramid, roi: Tensor, coarse: Tensor, truth: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch whose feature pyramid is at hand; see :meth:`forward`."""
        transfiner = self.model.transfiner
        roi_pyramid = transfiner.roi_pyramid(pyramid, roi, torch.arange(roi.shape[0], device=roi.device))
        losses = refinement_losses(transfiner, roi_pyramid, coarse, truth, weight, self.config)
        if not any(value.requires_grad for value in losses.values()):
            # Without any node, a frozen incoherence detector leaves nothing to learn from: a gradient of zeros.
            weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            nothing = sum((parameter.sum() for parameter in weights), start=weight.new_zeros(()))
            losses["loss_refine"] = losses["loss_refine"] + 0 * nothing
        return losses


def sample_nodes(nodes: LevelNodes, quota: int) -> LevelNodes:
    """Keep at most ``quota`` nodes of each RoI, chosen at random; parent links are not kept.

    Args:
        nodes: Nodes of one level.
        quota: Nodes per RoI.
    """
    score = torch.rand(nodes.roi.shape, device=nodes.roi.device)
    keep = (rank_in_roi(nodes.roi, score) < quota).nonzero()[:, 0]
    kept = take_nodes(nodes, keep)
    return replace(kept, parent=torch.full_like(kept.parent, -1))
