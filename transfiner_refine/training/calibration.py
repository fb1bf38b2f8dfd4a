"""What is set after training, on photos that it did not see: the detector's operating point, and the expected gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from transfiner_refine.config import RefineOptions
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

LARGEST_STAKE = 0.3
"""The same as ``LARGEST_GAIN``, where it is asked what accepting a refinement wins."""

HARM = 1.5
"""How much a loss counts beside a gain of the same size, there."""

ACCEPTANCE_WIDTH = 0.03
"""Within about this of the threshold a refinement counts as partly accepted, so that the decision has a slope."""

STRAYING = 1e-3
"""Weight of the squared change of the coefficients from those of the regression, there."""

STEPS = 300
"""Most steps of the optimiser, there."""


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


@contextmanager
def asked_statistics(model: RefinerModel) -> Iterator[list[Tensor]]:
    """Collect what a model's gain predictor is asked about, for each group of refinements; second tries are left out.

    Yields:
        Statistics ``(n, K)`` on the CPU, a group after the other while the context lasts; none without a predictor.
    """
    rows: list[Tensor] = []
    if model.gain_predictor is None:
        yield rows
        return

    def collect(_: nn.Module, given: tuple[Tensor, bool]) -> None:
        statistics, again = given
        if not again:  # one that strayed too far is tried without its proposal
            rows.append(statistics.cpu())

    hook = model.gain_predictor.register_forward_pre_hook(collect)
    try:
        yield rows
    finally:
        hook.remove()


def fit_gain(
    model: RefinerModel, statistics: Tensor, gains: Tensor, weights: Tensor | None = None, *, again: bool = False
) -> None:
    """Fit the gain predictor by weighted ridge regression.

    Args:
        model: A model with a gain predictor, which is changed in place.
        statistics: ``(N, 10)`` float, :func:`~transfiner_refine.modeling.gain.refinement_statistics` of N refinements
            of objects that training did not see, or ``(N, 14)`` with their
            :func:`~transfiner_refine.modeling.gain.edge_statistics` behind them: then both functions of the predictor
            are fitted. ``(N, 16)``, with those of proposals behind these, fits the function of such refinements alone:
            the others are for refinements without proposals. It is fitted on to what accepting wins, where a loss
            counts half as much again, by the threshold of :attr:`RefineOptions.keep_if_gain_below
            <transfiner_refine.RefineOptions>`.
        gains: ``(N,)`` float, the Boundary IoU that each of them won.
        weights: ``(N,)`` float above 0, how much each counts; None counts all the same.
        again: Whether these are refinements without a proposal where the one behind it was refused, with 14
            statistics: their function is fitted in the same way as that of proposals.

    Raises:
        InvalidInputError: If the model has no gain predictor, or there are fewer refinements than coefficients.
    """
    predictor = model.gain_predictor
    if predictor is None:
        raise InvalidInputError("expected a model with a gain predictor, got one without: use with_gain_predictor")
    functions = predictor.functions
    if again:
        if predictor.again_weight is None or predictor.again_bias is None:
            raise InvalidInputError("expected a model with a segmenter, got one without: nothing is tried again")
        functions = [(predictor.again_weight, predictor.again_bias)]
    widths = [len(weight) for weight, _ in functions]
    width = statistics.shape[1] if statistics.ndim == 2 else 0
    if width not in widths or len(statistics) != len(gains) or len(gains) <= width:
        raise InvalidInputError(
            f"expected more than {max(width, min(widths))} rows of {' or '.join(map(str, widths))} statistics, one for "
            f"each gain, got {tuple(statistics.shape)} statistics and {len(gains)} gains: calibrate on more objects"
        )
    share = torch.ones_like(gains, dtype=torch.float64) if weights is None else weights.double()
    decides = again or (width == widths[-1] and predictor.proposal_weight is not None)
    for weight, bias in functions[-1:] if decides else functions:
        if len(weight) <= width:
            fit = _accepting if decides else _ridge
            slopes, offset = fit(statistics[:, : len(weight)].double(), gains.double(), share / share.sum())
            with torch.no_grad():
                weight.copy_(slopes)
                bias.copy_(offset[None])


def _ridge(x: Tensor, gains: Tensor, share: Tensor, losses: float = 1.0) -> tuple[Tensor, Tensor]:
    """Slopes ``(K,)`` and offset of gains ``(N,)`` by statistics ``(N, K)``, with weights ``(N,)`` that sum to 1.

    ``losses`` is what a loss counts beside a gain.
    """
    y = gains.clamp(-LARGEST_GAIN, LARGEST_GAIN)
    y = torch.where(y < 0, losses * y, y)
    mean, deviation = _scale(x, share)
    centre = share @ y
    z = (x - mean) / deviation
    penalty = RIDGE * torch.eye(x.shape[1], dtype=torch.float64, device=z.device)
    weighted = z.T * share  # (K, N)
    slopes = torch.linalg.solve(weighted @ z + penalty, weighted @ (y - centre)) / deviation
    return slopes, centre - slopes @ mean


def _accepting(x: Tensor, gains: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_ridge`, and from there to the largest gain by those that are accepted."""
    threshold = RefineOptions().keep_if_gain_below
    slopes, offset = _ridge(x, gains, share, HARM)
    mean, deviation = _scale(x, share)
    z = (x - mean) / deviation
    stakes = gains.clamp(-LARGEST_STAKE, LARGEST_STAKE)
    stakes = torch.where(stakes < 0, HARM * stakes, stakes)
    start = slopes * deviation
    with torch.enable_grad():
        moved = start.clone().requires_grad_()
        centre = (offset + slopes @ mean).clone().requires_grad_()
        optimizer = torch.optim.LBFGS([moved, centre], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            accepted = torch.sigmoid((z @ moved + centre - threshold) / ACCEPTANCE_WIDTH)
            value = STRAYING * ((moved - start) ** 2).sum() - (share * stakes * accepted).sum()
            value.backward()
            return value

        optimizer.step(loss)
    # What decides is on which side of the threshold a prediction lies: how far away is told by the gains once more.
    distance = (z @ moved + centre).detach() - threshold
    wanted = gains.clamp(-LARGEST_GAIN, LARGEST_GAIN) - threshold
    stretch = ((share * distance) @ wanted / ((share * distance) @ distance)).clamp(min=1e-3)
    slopes = stretch * moved.detach() / deviation
    return slopes, threshold + stretch * (centre.detach() - threshold) - slopes @ mean


def _scale(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and deviation ``(K,)`` of statistics ``(N, K)``."""
    mean = share @ x
    return mean, (share @ (x - mean) ** 2).sqrt().clamp(min=1e-6)
