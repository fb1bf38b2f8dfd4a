"""Crisp masks from any detector's boxes and coarse masks, by the method of Mask Transfiner (CVPR 2022)."""

from transfiner_refine.config import RefineOptions, TransfinerConfig
from transfiner_refine.errors import InvalidInputError, MissingDependencyError, TransfinerError, WeightsError
from transfiner_refine.refiner import Refiner
from transfiner_refine.types import FeaturePyramid, Instances

__version__ = "0.1.0"

__all__ = [
    "FeaturePyramid",
    "Instances",
    "InvalidInputError",
    "MissingDependencyError",
    "RefineOptions",
    "Refiner",
    "TransfinerConfig",
    "TransfinerError",
    "WeightsError",
    "__version__",
]
