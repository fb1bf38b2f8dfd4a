"""How good masks are: mask IoU, Boundary IoU, matching to ground truth, and coarse against refined figures."""

from transfiner_refine.evaluation.boundary import boundary_iou, boundary_region, boundary_width, mask_iou
from transfiner_refine.evaluation.matching import Matches, match_detections, pairwise_iou
from transfiner_refine.evaluation.report import PairedFigures, figures_from_scores, paired_figures

__all__ = [
    "Matches",
    "PairedFigures",
    "boundary_iou",
    "boundary_region",
    "boundary_width",
    "figures_from_scores",
    "mask_iou",
    "match_detections",
    "paired_figures",
    "pairwise_iou",
]
