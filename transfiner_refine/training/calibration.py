"""What is set after training, on photos that it did not see: the detector's operating point, and the expected gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.model import RefinerModel

LARGEST_GAIN = 0.1
"""Gains beyond this, either way, count as this: a few masks must not decide the fit."""

EXACT_WEIGHT = 0.6
"""Weight of a mask that is ground truth already beside that of a real detection, when a gain predictor is fitted.

Detections alone make a predictor that accepts nearly everything, since nearly everything wins. Counted in full, the
exact masks make one that refuses the smaller gains with them.
"""

RIDGE = 0.01
"""Weight of the penalty on the coefficients of the statistics, each scaled to unit variance."""


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


def with_gain_predictor(model: RefinerModel) -> RefinerModel:
    """Copy a model, with a gain predictor that predicts zero until :func:`fit_gain` sets it.

    Args:
        model: Not changed; a gain predictor that it has is replaced.
    """
    copy = type(model)(replace(model.config, predicts_gain=True))
    assert copy.gain_predictor is not None
    fresh = {f"gain_predictor.{name}": value for name, value in copy.gain_predictor.state_dict().items()}
    copy.load_state_dict({**model.state_dict(), **fresh})
    return copy.to(next(model.parameters()).device).eval()


def fit_gain(model: RefinerModel, statistics: Tensor, gains: Tensor, weights: Tensor | None = None) -> None:
    """Fit the gain predictor by weighted ridge regression.

    Args:
        model: A model with a gain predictor, which is changed in place.
        statistics: ``(N, 10)`` float, :func:`~transfiner_refine.modeling.gain.refinement_statistics` of N refinements
            of objects that training did not see, or ``(N, 14)`` with their
            :func:`~transfiner_refine.modeling.gain.edge_statistics` behind them: then both functions of the predictor
            are fitted. ``(N, 16)``, with those of proposals behind these, fits the function of such refinements alone:
            the others are for refinements without proposals.
        gains: ``(N,)`` float, the Boundary IoU that each of them won.
        weights: ``(N,)`` float above 0, how much each counts; None counts all the same.

    Raises:
        InvalidInputError: If the model has no gain predictor, or there are fewer refinements than coefficients.
    """
    predictor = model.gain_predictor
    if predictor is None:
        raise InvalidInputError("expected a model with a gain predictor, got one without: use with_gain_predictor")
    functions = predictor.functions
    widths = [len(weight) for weight, _ in functions]
    width = statistics.shape[1] if statistics.ndim == 2 else 0
    if width not in widths or len(statistics) != len(gains) or len(gains) <= width:
        raise InvalidInputError(
            f"expected more than {max(width, min(widths))} rows of {' or '.join(map(str, widths))} statistics, one for "
            f"each gain, got {tuple(statistics.shape)} statistics and {len(gains)} gains: calibrate on more objects"
        )
    share = torch.ones_like(gains, dtype=torch.float64) if weights is None else weights.double()
    of_proposals = width == widths[-1] and predictor.proposal_weight is not None
    for weight, bias in functions[-1:] if of_proposals else functions:
        if len(weight) <= width:
            slopes, offset = _ridge(statistics[:, : len(weight)].double(), gains.double(), share / share.sum())
            with torch.no_grad():
                weight.copy_(slopes)
                bias.copy_(offset[None])


def _ridge(x: Tensor, gains: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes ``(K,)`` and offset of gains ``(N,)`` by statistics ``(N, K)``, with weights ``(N,)`` that sum to 1."""
    y = gains.clamp(-LARGEST_GAIN, LARGEST_GAIN)
    mean, centre = share @ x, share @ y
    deviation = (share @ (x - mean) ** 2).sqrt().clamp(min=1e-6)
    z = (x - mean) / deviation
    penalty = RIDGE * torch.eye(x.shape[1], dtype=torch.float64, device=z.device)
    weighted = z.T * share  # (K, N)
    slopes = torch.linalg.solve(weighted @ z + penalty, weighted @ (y - centre)) / deviation
    return slopes, centre - slopes @ mean
