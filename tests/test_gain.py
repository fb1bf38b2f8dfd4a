"""The predicted gain: what it is told, how it is fitted, and what a call does with it."""

from dataclasses import replace

import pytest
import torch
from small_models import discs, encoder_config, eventful_model, random_image
from torch import Tensor

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.gain import EDGE_STATISTICS, STATISTICS, edge_statistics, refinement_statistics
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.pixel_head import PIXEL_SIDE
from transfiner_refine.modeling.transfiner import Detection, TransfinerOutput
from transfiner_refine.training.calibration import fit_gain, with_gain_predictor
from transfiner_refine.types import LevelNodes

FREE = RefineOptions(keep_if_iou_below=0.0, keep_if_gain_below=-1.0)
H, W = 96, 120
STATISTICS_WITH_EDGES = len(STATISTICS) + len(EDGE_STATISTICS)


@pytest.fixture(scope="module")
def model() -> RefinerModel:
    return with_gain_predictor(eventful_model(encoder_config(decoder="label")))  # its corrections are large


@pytest.fixture
def masks() -> Tensor:
    return discs(H, W, [(40.0, 40.0, 25.0), (70.0, 50.0, 30.0), (90.0, 30.0, 20.0)])


def test_statistics_against_a_loop():
    """Two RoIs, the second without a node, against sums written out."""
    long = torch.tensor
    root = LevelNodes(long([0, 0]), long([1, 2]), long([1, 2]), long([-1, -1]), torch.tensor([0.0, 2.0]), 28)
    fine = LevelNodes(long([0]), long([2]), long([2]), long([0]), torch.tensor([1.0]), 56)
    coarse = torch.zeros(2, 56, 56)
    coarse[:, 10:20, 10:20] = 1.0
    probs = coarse.clone()
    probs[0, 20:25, 10:20] = 0.75  # 50 cells of 100 added
    probs[0, 10, 10:20] = 0.25  # 10 removed
    coarse[1, 13, 13], probs[1, 13, 13] = 0.0, 0.0  # a hole that 28×28 cannot hold
    root_logits = torch.full((2, 28, 28), -3.0)
    detection = Detection(root_logits, (root, fine), (root, fine), torch.zeros(2, 1, 28, 28))
    output = TransfinerOutput(probs, probs != coarse, detection, (torch.tensor([0.75, 0.25]), torch.tensor([0.9])))
    found = refinement_statistics(output, coarse)
    sigmoid = lambda x: 1 / (1 + torch.exp(torch.tensor(-float(x))))  # noqa: E731
    quiet = float(sigmoid(-3))
    changed = (probs[0] >= 0.5) != (coarse[0] >= 0.5)
    around = [changed[max(r - 2, 0) : r + 3, max(c - 2, 0) : c + 3].sum() for r in range(56) for c in range(56)]
    thick = 0.01 + sum(int(n) > 15 for n in around) / 100
    assert thick > 0.2
    expected = torch.tensor(
        [
            [0.61, 0.11, float(sigmoid(0) + sigmoid(2)) / 2, 4 * 0.9 * 0.1, 1.0, quiet, 0.5, thick, 0.01, 0.01],
            [0.01, 0.01, 1.0, 0.0, 1.0, quiet, 0.0, 0.01, 0.01 + 1 / 99, 0.01],
        ]
    )
    logarithms = [name.startswith("log") for name in STATISTICS]
    expected[:, logarithms] = expected[:, logarithms].log()
    assert found.shape == (2, len(STATISTICS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_linear_gain_is_recovered(model: RefinerModel):
    generator = torch.Generator().manual_seed(0)
    statistics = torch.randn(400, len(STATISTICS), generator=generator)
    statistics *= torch.tensor([1.0, 2, 0.1, 0.05, 0.2, 0.1, 0.3, 1, 1, 1])
    weight = torch.tensor([0.004, -0.003, 0.05, 0.1, -0.02, 0.03, 0.01, -0.002, 0.003, 0.001])
    gains = statistics @ weight + 0.02
    fitted = with_gain_predictor(model)
    fit_gain(fitted, statistics, gains)
    assert fitted.gain_predictor is not None
    assert (fitted.gain_predictor(statistics) - gains).abs().max() < 2e-3
    with pytest.raises(InvalidInputError, match="more than 10 rows"):
        fit_gain(fitted, statistics[:10], gains[:10])
    with pytest.raises(InvalidInputError, match="with_gain_predictor"):
        fit_gain(RefinerModel(encoder_config()), statistics, gains)


def test_edges_of_the_photo_have_a_function_of_their_own():
    """With the edge statistics both functions are fitted, the second to what the first cannot see."""
    fitted = with_gain_predictor(eventful_model(encoder_config(pixel_widths=(8, 12))))
    assert fitted.gain_predictor is not None
    statistics = torch.randn(300, STATISTICS_WITH_EDGES, generator=torch.Generator().manual_seed(0))
    gains = 0.01 * statistics[:, 0] + 0.02 * statistics[:, -1]
    fit_gain(fitted, statistics, gains)
    assert (fitted.gain_predictor(statistics) - gains).abs().max() < 3e-3
    blind = fitted.gain_predictor(statistics[:, : len(STATISTICS)])
    assert 0.01 < (blind - gains).std() < 0.03 and torch.corrcoef(torch.stack([blind, statistics[:, 0]]))[0, 1] > 0.95
    with pytest.raises(InvalidInputError, match="10 or 14 statistics"):
        fit_gain(fitted, statistics[:, :12], gains)
    with pytest.raises(InvalidInputError, match="rows of 10 statistics"):
        fit_gain(with_gain_predictor(eventful_model(encoder_config())), statistics, gains)


def test_an_outline_on_an_edge_of_the_photo_is_told_from_one_beside_it():
    pixels = torch.full((2, 3, PIXEL_SIDE, PIXEL_SIDE), 0.2)
    pixels[..., 224:] = 0.8
    coarse = torch.zeros(2, 112, 112)
    coarse[0, :, 56:] = 1.0  # on the edge
    coarse[1, :, 54:] = 1.0  # eight pixels beside it
    aligned = torch.zeros(2, PIXEL_SIDE, PIXEL_SIDE)
    aligned[..., 224:] = 1.0
    found = dict(zip(EDGE_STATISTICS, edge_statistics(pixels, coarse, aligned).T, strict=True))
    assert 10 * found["coarse_blur"][0] < found["coarse_blur"][1]
    assert found["coarse_stray"].tolist() == [0.0, 0.5]  # half of the pixels beside an outline two pixels thick
    torch.testing.assert_close(found["refined_blur"], found["coarse_blur"][[0, 0]])
    assert not found["refined_stray"].any()
    nothing = edge_statistics(pixels, torch.zeros_like(coarse), torch.zeros_like(aligned))
    assert not nothing.any()


def test_without_alignment_the_blind_function_predicts(masks: Tensor):
    model = with_gain_predictor(eventful_model(encoder_config(pixel_widths=(8, 12))))
    predictor, image = model.gain_predictor, random_image(H, W)
    assert predictor is not None and predictor.edge_bias is not None
    with torch.no_grad():
        predictor.bias.fill_(0.25)
        predictor.edge_bias.fill_(0.5)
    for aligns, expected in ((True, 0.5), (False, 0.25)):
        out = Refiner(model).refine(image, masks=masks, options=replace(FREE, align_pixels=aligns))
        assert out.predicted_gain is not None and out.predicted_gain.tolist() == [expected] * 3


def test_one_extreme_mask_does_not_decide_the_fit(model: RefinerModel):
    statistics = torch.randn(100, len(STATISTICS), generator=torch.Generator().manual_seed(0))
    gains = torch.full((100,), 0.05)
    gains[0] = -1.0
    fitted = with_gain_predictor(model)
    fit_gain(fitted, statistics, gains)
    assert fitted.gain_predictor is not None
    assert float(fitted.gain_predictor(statistics).detach().mean()) > 0.045


def test_only_masks_that_promise_too_little_are_kept_coarse(model: RefinerModel, masks: Tensor):
    with torch.no_grad():
        predictor = with_gain_predictor(model)
        assert predictor.gain_predictor is not None
        predictor.gain_predictor.weight[0] = -1.0  # what adds much promises little
    refiner, image = Refiner(predictor), random_image(H, W)
    free = refiner.refine(image, masks=masks, options=FREE)
    gain = free.predicted_gain
    assert gain is not None and gain.shape == (3,) and len(gain.unique()) == 3
    assert free.kept_coarse is not None and not free.kept_coarse.any()
    limit = float(gain.sort().values[:2].mean())
    assert -1 <= limit <= 5
    shifted = with_gain_predictor(predictor)
    shifted.load_state_dict({**predictor.state_dict(), "gain_predictor.bias": torch.tensor([-limit])})
    out = Refiner(shifted).refine(image, masks=masks, options=replace(FREE, keep_if_gain_below=0.0))
    worst = int(gain.argmin())
    assert out.kept_coarse is not None and out.kept_coarse.nonzero().flatten().tolist() == [worst]
    assert torch.equal(out.masks[worst], masks[worst])
    others = [i for i in range(3) if i != worst]
    assert torch.equal(out.masks[others], free.masks[others])
    assert out[[worst]].predicted_gain is not None


def test_a_model_without_a_predictor_refuses_nothing(masks: Tensor):
    refiner = Refiner(eventful_model(encoder_config()))
    out = refiner.refine(random_image(H, W), masks=masks, options=replace(FREE, keep_if_gain_below=1.0))
    assert out.predicted_gain is None and out.kept_coarse is not None and not out.kept_coarse.any()


def test_nothing_to_refine(model: RefinerModel):
    refiner, image = Refiner(model), random_image(H, W)
    empty = refiner.refine(image, masks=torch.zeros(0, H, W, dtype=torch.bool))
    assert empty.predicted_gain is not None and empty.predicted_gain.shape == (0,)
    blank = refiner.refine(image, masks=torch.zeros(2, H, W, dtype=torch.bool))
    assert blank.predicted_gain is not None and blank.predicted_gain.tolist() == [0.0, 0.0]
    assert (
        refiner.refine(image, masks=discs(H, W, [(40, 40, 20)]), options=RefineOptions(depth=0)).predicted_gain is None
    )


def test_it_is_saved_with_the_model(model: RefinerModel, masks: Tensor, tmp_path):
    trained = with_gain_predictor(model)
    fit_gain(
        trained,
        torch.randn(50, len(STATISTICS), generator=torch.Generator().manual_seed(1)),
        torch.linspace(-0.1, 0.1, 50),
    )
    refiner = Refiner(trained)
    again = Refiner.from_pretrained(refiner.save_pretrained(tmp_path / "saved"))
    image = random_image(H, W)
    a, b = (r.refine(image, masks=masks, options=FREE).predicted_gain for r in (refiner, again))
    assert a is not None and b is not None and bool(a.abs().max() > 0)
    torch.testing.assert_close(a, b)


def test_limits_of_the_option_are_checked():
    with pytest.raises(InvalidInputError, match="keep_if_gain_below from -1 to 1"):
        RefineOptions(keep_if_gain_below=-2)
