"""Setting the operating point of a trained incoherence detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.model import RefinerModel


def calibrate_thresholds(model: RefinerModel, thresholds: Sequence[float]) -> None:
    """Shift the detector's biases, so that a probability of 0.5 stands where ``thresholds`` stood, level by level.

    What training counts as incoherent (jittered, covering its children) is not what is best refined: a false root
    node can do harm, a missed finer one only leaves a step in the outline. The threshold of a call stays 0.5.

    Args:
        model: The model, changed in place.
        thresholds: The probability from which a cell is to be a node, coarsest level first.

    Raises:
        InvalidInputError: If there is not one threshold between 0 and 1 for each level.
    """
    depth = model.config.depth
    if len(thresholds) != depth or not all(0 < t < 1 for t in thresholds):
        raise InvalidInputError(f"expected {depth} thresholds between 0 and 1, one for each level, got {thresholds}")
    detector = model.transfiner.incoherence_detector
    biases = [detector.classifier.bias, *(finer.bias for finer in detector.finer_classifier)]
    with torch.no_grad():
        for bias, threshold in zip(biases, thresholds, strict=False):
            assert isinstance(bias, torch.Tensor)
            bias -= torch.logit(torch.tensor(threshold))
