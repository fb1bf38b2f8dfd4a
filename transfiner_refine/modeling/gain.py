"""How much a refinement is expected to help, told from the refinement itself, so that a bad one can be refused."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.functional.edges import guided_filter
from transfiner_refine.functional.incoherence import dilate
from transfiner_refine.functional.pooling import halve
from transfiner_refine.modeling.transfiner import TransfinerOutput

STATISTICS = (
    "log_changed",
    "log_removed",
    "root_certainty",
    "label_doubt",
    "unchanged_certainty",
    "incoherence",
    "changed_certainty",
    "log_thick",
    "log_detail_28",
    "log_detail_56",
)
"""What :func:`refinement_statistics` returns, in this order."""

EDGE_STATISTICS = ("coarse_blur", "coarse_stray", "refined_blur", "refined_stray")
"""What :func:`edge_statistics` returns, in this order."""

PROPOSAL_STATISTICS = ("proposal_agreement", "proposal_quality")
"""What the segmenter says of its proposal: the IoU with the coarse mask, and the IoU that it expects."""

SMALLEST_CHANGE = 0.01
"""Share of the coarse mask below which an area is as good as none."""

EDGE_WINDOW, EDGE_EPS = 7, 1e-4
"""Window of the guided filter that tells how well an outline follows the photo, and its regularisation."""

THICK_WINDOW, THICK_SHARE = 5, 0.6
"""A cell lies in a thick change if more than this share of the window of this many cells around it has changed."""


def refinement_statistics(output: TransfinerOutput, coarse: Tensor, mask_threshold: float = 0.5) -> Tensor:
    """Summarise what a refinement did and how sure it was.

    Args:
        output: The refinement of R RoIs.
        coarse: ``(R, S, S)`` float32 coarse probabilities at the finest level.
        mask_threshold: Probability from which a cell belongs to the mask.

    Returns:
        ``(R, 10)`` float32, the columns of ``STATISTICS``: logarithms of the area changed and of the area removed, as
        shares of the coarse mask's; the mean incoherence of the root nodes; the mean doubt ``4 p (1 - p)`` of the
        refined labels below the root; how far from one half the probabilities of cells lie whose label is as it was;
        the mean incoherence of all root cells; how far from one half those of changed cells lie; logarithms of the area
        that is more than a thin line of changed cells, and of what the coarse mask would lose at 28×28 and at 56×56:
        the mask of a head has little to lose, an outline drawn by hand has much.
    """
    before, after = coarse >= mask_threshold, output.probs >= mask_threshold
    area = before.sum(dim=(1, 2)).clamp(min=1)
    changed = before != after
    removed = before & ~after
    thick = F.avg_pool2d(changed[:, None].float(), THICK_WINDOW, 1, THICK_WINDOW // 2)[:, 0] > THICK_SHARE
    certainty = (2 * output.probs - 1).abs()
    count = coarse.shape[0]
    root, *finer = output.detection.quadtree
    doubts = [4 * p * (1 - p) for p in output.node_probs[1:]]
    rois = torch.cat([nodes.roi for nodes in finer]) if finer else root.roi[:0]
    doubt = _mean_by_roi(torch.cat(doubts) if doubts else root.logits[:0], rois, count, 0.0)
    areas = [changed, removed, thick, *(_lost(coarse, side, mask_threshold) for side in (ROOT_SIDE, 2 * ROOT_SIDE))]
    log_changed, log_removed, log_thick, *log_detail = (
        torch.log(x.sum(dim=(1, 2)) / area + SMALLEST_CHANGE) for x in areas
    )
    return torch.stack(
        [
            log_changed,
            log_removed,
            _mean_by_roi(torch.sigmoid(root.logits), root.roi, count, 1.0),
            doubt,
            _mean_where(certainty, ~changed),
            torch.sigmoid(output.detection.root_logits).mean(dim=(1, 2)),
            _mean_where(certainty, changed),
            log_thick,
            *log_detail,
        ],
        dim=1,
    ).float()


def edge_statistics(pixels: Tensor, coarse: Tensor, aligned: Tensor, mask_threshold: float = 0.5) -> Tensor:
    """Tell how well two outlines of each object follow the edges of the photo.

    A guided filter moves and blurs a mask where its outline is not the photo's, and leaves it where it is. An outline
    that was right to the pixel shows in this before anything is known of the refinement.

    Args:
        pixels: ``(R, 3, P, P)`` float32, RGB in [0, 1], RoI frame.
        coarse: ``(R, S, S)`` float32 coarse probabilities.
        aligned: ``(R, P, P)`` float32 refined probabilities.
        mask_threshold: Probability from which a pixel belongs to the mask.

    Returns:
        ``(R, 4)`` float32, the columns of ``EDGE_STATISTICS``: how undecided the filtered mask is, and how many pixels
        it labels otherwise, both summed and over the length of the outline; of the coarse and of the refined mask.
    """
    pixels, aligned = halve(pixels), halve(aligned)
    before = F.interpolate(coarse[:, None], size=aligned.shape[1:], mode="bilinear")[:, 0]
    found = []
    for mask in (before >= mask_threshold, aligned >= mask_threshold):
        length = (dilate(mask) & dilate(~mask)).sum(dim=(1, 2)).clamp(min=1)
        filtered = guided_filter(pixels, mask.float(), EDGE_WINDOW, EDGE_EPS)
        found.append((4 * filtered * (1 - filtered)).sum(dim=(1, 2)) / length)
        found.append(((filtered >= 0.5) != mask).sum(dim=(1, 2)) / length)
    return torch.stack(found, dim=1).float()


def _lost(coarse: Tensor, side: int, threshold: float) -> Tensor:
    """Cells of ``(R, S, S)`` whose label is another once the mask has been through a grid of a smaller side: bool."""
    scale = coarse.shape[-1] // side
    if scale <= 1:
        return torch.zeros_like(coarse, dtype=torch.bool)
    small = F.avg_pool2d(coarse[:, None], scale)
    again = F.interpolate(small, size=coarse.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    return (again >= threshold) != (coarse >= threshold)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``(R, S, S)`` over the chosen cells: ``(R,)``, zero where none is chosen."""
    return (values * where).sum(dim=(1, 2)) / where.sum(dim=(1, 2)).clamp(min=1)


def _mean_by_roi(values: Tensor, roi: Tensor, count: int, empty: float) -> Tensor:
    """Mean of the values of each of ``count`` RoIs, ``(count,)``; ``empty`` for a RoI without any."""
    number = values.new_zeros(count).scatter_add(0, roi, torch.ones_like(values))
    total = values.new_zeros(count).scatter_add(0, roi, values)
    return torch.where(number > 0, total / number.clamp(min=1), empty)


class GainPredictor(nn.Module):
    """Predicts the Boundary IoU that a refinement wins, by a linear function of its statistics.

    It starts by predicting no gain and no loss. It has so few numbers that some dozens of photos that training did not
    see are enough to fit it; see :func:`transfiner_refine.training.calibration.fit_gain`.

    Args:
        sees_edges: Whether it has a second function, for refinements whose edge statistics are known.
        sees_proposals: Whether it has a third one, for those that a segmenter made a proposal for besides, and a
            fourth, for those without a proposal where the one behind it was refused.
    """

    def __init__(self, sees_edges: bool = False, sees_proposals: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(STATISTICS)))
        self.bias = nn.Parameter(torch.zeros(1))
        self.edge_weight: nn.Parameter | None = None
        self.edge_bias: nn.Parameter | None = None
        if sees_edges:
            self.edge_weight = nn.Parameter(torch.zeros(len(STATISTICS) + len(EDGE_STATISTICS)))
            self.edge_bias = nn.Parameter(torch.zeros(1))
        self.proposal_weight: nn.Parameter | None = None
        self.proposal_bias: nn.Parameter | None = None
        self.again_weight: nn.Parameter | None = None
        self.again_bias: nn.Parameter | None = None
        if sees_proposals:
            count = len(STATISTICS) + len(EDGE_STATISTICS)
            self.proposal_weight = nn.Parameter(torch.zeros(count + len(PROPOSAL_STATISTICS)))
            self.proposal_bias = nn.Parameter(torch.zeros(1))
            self.again_weight = nn.Parameter(torch.zeros(count))
            self.again_bias = nn.Parameter(torch.zeros(1))

    @property
    def functions(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weights and bias of each function of a first refinement that it has, those of more statistics behind."""
        pairs = (
            (self.weight, self.bias),
            (self.edge_weight, self.edge_bias),
            (self.proposal_weight, self.proposal_bias),
        )
        return [(weight, bias) for weight, bias in pairs if weight is not None and bias is not None]

    def forward(self, statistics: Tensor, again: bool = False) -> Tensor:
        """Map statistics to predicted gains ``(R,)`` float32.

        Args:
            statistics: ``(R, 10)``, or ``(R, 14)`` with the edge statistics after them, or ``(R, 16)`` with those of
                proposals after these.
            again: Whether these refinements are tried because those behind the segmenter's proposals were refused.
        """
        functions = self.functions
        if again and self.again_weight is not None and self.again_bias is not None:
            functions = [functions[0], (self.again_weight, self.again_bias)]
        weight, bias = [pair for pair in functions if pair[0].shape[0] <= statistics.shape[1]][-1]
        return F.linear(statistics[:, : weight.shape[0]], weight[None].float(), bias.float())[:, 0]
