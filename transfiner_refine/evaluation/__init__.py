"""How good masks are: IoU, Boundary IoU, average precision, incoherent regions, and coarse against refined figures."""

from transfiner_refine.evaluation.boundary import boundary_iou, boundary_region, boundary_width, mask_iou
from transfiner_refine.evaluation.coco_metrics import AveragePrecision, average_precision
from transfiner_refine.evaluation.ground_truth import GroundTruth, load_ground_truth
from transfiner_refine.evaluation.incoherence import IncoherenceAnalysis, analyse_incoherence, incoherent_regions
from transfiner_refine.evaluation.lvis import load_lvis
from transfiner_refine.evaluation.matching import Matches, match_detections, pairwise_iou
from transfiner_refine.evaluation.report import PairedFigures, figures_from_scores, paired_figures

__all__ = [
    "AveragePrecision",
    "GroundTruth",
    "IncoherenceAnalysis",
    "Matches",
    "PairedFigures",
    "analyse_incoherence",
    "average_precision",
    "boundary_iou",
    "boundary_region",
    "boundary_width",
    "figures_from_scores",
    "incoherent_regions",
    "load_ground_truth",
    "load_lvis",
    "mask_iou",
    "match_detections",
    "paired_figures",
    "pairwise_iou",
]
