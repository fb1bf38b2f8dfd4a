"""How much a refinement is expected to help, told from the refinement itself, so that a bad one can be refused."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.modeling.transfiner import TransfinerOutput

STATISTICS = (
    "log_changed",
    "log_removed",
    "root_certainty",
    "label_doubt",
    "unchanged_certainty",
    "incoherence",
)
"""What :func:`refinement_statistics` returns, in this order."""

SMALLEST_CHANGE = 0.01
"""Share of the coarse mask below which a changed or removed area is as good as none."""


def refinement_statistics(output: TransfinerOutput, coarse: Tensor, mask_threshold: float = 0.5) -> Tensor:
    """Summarise what a refinement did and how sure it was.

    Args:
        output: The refinement of R RoIs.
        coarse: ``(R, S, S)`` float32 coarse probabilities at the finest level.
        mask_threshold: Probability from which a cell belongs to the mask.

    Returns:
        ``(R, 6)`` float32, the columns of ``STATISTICS``: logarithms of the area changed and of the area removed, as
        shares of the coarse mask's; the mean incoherence of the root nodes; the mean doubt ``4 p (1 - p)`` of the
        refined labels below the root; how far from one half the probabilities of cells lie whose label is as it was;
        and the mean incoherence of all root cells.
    """
    before, after = coarse >= mask_threshold, output.probs >= mask_threshold
    area = before.sum(dim=(1, 2)).clamp(min=1)
    added = (after & ~before).sum(dim=(1, 2)) / area
    removed = (before & ~after).sum(dim=(1, 2)) / area
    same = before == after
    certainty = (2 * output.probs - 1).abs()
    unchanged = (certainty * same).sum(dim=(1, 2)) / same.sum(dim=(1, 2)).clamp(min=1)
    count = coarse.shape[0]
    root, *finer = output.detection.quadtree
    doubts = [4 * p * (1 - p) for p in output.node_probs[1:]]
    rois = torch.cat([nodes.roi for nodes in finer]) if finer else root.roi[:0]
    doubt = _mean_by_roi(torch.cat(doubts) if doubts else root.logits[:0], rois, count, 0.0)
    return torch.stack(
        [
            torch.log(added + removed + SMALLEST_CHANGE),
            torch.log(removed + SMALLEST_CHANGE),
            _mean_by_roi(torch.sigmoid(root.logits), root.roi, count, 1.0),
            doubt,
            unchanged,
            torch.sigmoid(output.detection.root_logits).mean(dim=(1, 2)),
        ],
        dim=1,
    ).float()


def _mean_by_roi(values: Tensor, roi: Tensor, count: int, empty: float) -> Tensor:
    """Mean of the values of each of ``count`` RoIs, ``(count,)``; ``empty`` for a RoI without any."""
    number = values.new_zeros(count).index_add(0, roi, torch.ones_like(values))
    total = values.new_zeros(count).index_add(0, roi, values)
    return torch.where(number > 0, total / number.clamp(min=1), empty)


class GainPredictor(nn.Module):
    """Predicts the Boundary IoU that a refinement wins, by a linear function of its statistics.

    It starts by predicting no gain and no loss. It has seven numbers, so that a few dozen photos that training did not
    see are enough to fit it; see :func:`transfiner_refine.training.calibration.fit_gain`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(STATISTICS)))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, statistics: Tensor) -> Tensor:
        """Map statistics ``(R, 6)`` to predicted gains ``(R,)`` float32."""
        return F.linear(statistics, self.weight[None].float(), self.bias.float())[:, 0]
