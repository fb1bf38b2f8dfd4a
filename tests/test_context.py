"""The incoherence detector's wide context: without effect at the start, then far-sighted, and trained by its guess."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from small_models import CIRCLES, HALF, encoder_config, make_eventful, refine, roi_scene, small_transfiner

from transfiner_refine import InvalidInputError, TransfinerConfig
from transfiner_refine.functional.coarse import coarse_levels
from transfiner_refine.modeling.context import WideContext
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.transfiner import MaskTransfiner
from transfiner_refine.training.losses import LossConfig, refinement_losses


@pytest.mark.parametrize("scales", [1, 2])
def test_it_starts_without_effect(scales: int):
    features = torch.randn(2, 16, 28, 28)
    assert torch.equal(WideContext(16, scales)(features), features)


def test_a_model_without_it_gets_it_unchanged():
    plain = small_transfiner()
    make_eventful(plain)
    wide = small_transfiner(context_scales=2)
    missing, unexpected = wide.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    assert torch.equal(refine(wide, CIRCLES).probs, refine(plain, CIRCLES).probs)


def test_it_sees_the_whole_roi_where_the_tower_does_not():
    torch.manual_seed(0)
    context = WideContext(16, 2)
    torch.nn.init.normal_(context.out.weight)
    features = torch.randn(1, 16, 28, 28)
    other = features.clone()
    other[:, :, 23, 13] += 10  # ten cells away, where four 3×3 convolutions do not reach
    difference = (context(features) - context(other))[0, :, 13, 13].abs().max()
    assert difference > 1e-4


def losses(estimate_weight: float, scales: int = 2) -> tuple[dict[str, torch.Tensor], MaskTransfiner]:
    transfiner = small_transfiner(context_scales=scales).train()
    roi_pyramid, coarse = roi_scene(transfiner, CIRCLES[:2])
    truth = F.interpolate(coarse[:, None], scale_factor=2.0, mode="nearest")[:, 0] >= 0.5
    config = LossConfig(estimate_weight=estimate_weight)
    return refinement_losses(transfiner, roi_pyramid, coarse, truth, torch.ones(2), config), transfiner


def test_its_guess_is_trained():
    found, transfiner = losses(0.5)
    found["loss_estimate"].backward()
    gradient = transfiner.incoherence_detector.get_parameter("estimate.weight").grad
    assert gradient is not None and gradient.abs().max() > 0


@pytest.mark.parametrize(("weight", "scales"), [(0.0, 2), (0.5, 0)])
def test_no_guess_is_trained_without_weight_or_context(weight: float, scales: int):
    assert "loss_estimate" not in losses(weight, scales)[0]


def test_no_guess_is_made_outside_of_training():
    transfiner = small_transfiner(context_scales=1)
    roi_pyramid, coarse = roi_scene(transfiner, CIRCLES[:1])
    levels = coarse_levels(coarse, 3)
    assert transfiner.eval().incoherence_detector(roi_pyramid, levels, 3, HALF).estimate is None
    assert transfiner.train().incoherence_detector(roi_pyramid, levels, 3, HALF).estimate is not None


@pytest.mark.parametrize("scales", [-1, 3, 1.5])
def test_other_scales_are_refused(scales: float):
    with pytest.raises(InvalidInputError, match="expected context_scales 0 to 2"):
        TransfinerConfig(context_scales=scales)  # type: ignore[arg-type]


def test_regions_of_the_ablations_differ(benchmark: Callable[[str], ModuleType]):
    """Each variant of another region runs, and refines other cells than the incoherent ones."""
    module = benchmark("baselines")
    model = RefinerModel(encoder_config())
    make_eventful(model.transfiner)
    touched = {}
    for network in ("transformer", "boundary", "without_28", "without_112"):
        baseline = module.with_network(model, network)
        make_eventful(baseline.transfiner)
        touched[network] = refine(baseline.transfiner, CIRCLES)
    nodes = {network: [len(level) for level in out.detection.quadtree] for network, out in touched.items()}
    assert nodes["boundary"] != nodes["transformer"] == nodes["without_28"]
    assert not torch.equal(touched["without_28"].probs, touched["transformer"].probs)
    assert not torch.equal(touched["without_112"].probs, touched["transformer"].probs)
