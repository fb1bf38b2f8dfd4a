"""The dense reference equals the sparse model, and the command that measures both."""

import json

import pytest
import torch
from benchmark_cases import run
from small_models import (
    CIRCLES,
    HALF,
    discs,
    encoder_config,
    eventful_model,
    make_eventful,
    random_pyramid,
    small_config,
    small_transfiner,
)

from transfiner_refine import InvalidInputError, Refiner
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.transfiner import MaskTransfiner

TOLERANCE = 1e-4
"""Largest difference: the order of float32 sums differs, and on random features each step makes it larger."""


def scene(model: MaskTransfiner, depth: int) -> tuple:
    """Arguments of both ways: RoIs of all sizes on two images, some of them reaching beyond the border."""
    masks = discs(256, 256, CIRCLES)
    rois = expand_boxes(boxes_from_masks(masks), model.config.box_margin)
    features = random_pyramid(256, 256, batch=2, channels=model.config.feature_channels, strides=model.config.strides)
    image = torch.arange(len(rois)) % 2
    return features, rois, image, crop_masks(masks, rois, 28 << (depth - 1)), depth, HALF


@pytest.mark.parametrize("changes", [{}, {"decoder": "label"}, {"lower_level_guidance": False}, {"propagate": False}])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_dense_equals_sparse(benchmark, changes: dict, at_once: int | None):
    dense = benchmark("dense_reference")
    model = small_transfiner(**changes)
    arguments = scene(model, 3)
    sparse = dense.refine_sparsely(model, *arguments)
    assert not torch.equal(sparse >= 0.5, arguments[3] >= 0.5)  # something was refined
    torch.testing.assert_close(dense.refine_densely(model, *arguments, at_once=at_once), sparse, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_at_every_depth(benchmark, depth: int):
    dense = benchmark("dense_reference")
    model = small_transfiner(depth=4)
    arguments = scene(model, depth)
    sparse = dense.refine_sparsely(model, *arguments)
    torch.testing.assert_close(dense.refine_densely(model, *arguments), sparse, rtol=0, atol=TOLERANCE)


def test_with_a_wide_context(benchmark):
    dense = benchmark("dense_reference")
    model = small_transfiner(context_scales=2)
    context = model.incoherence_detector.context
    assert context is not None
    torch.nn.init.normal_(context.out.weight, std=0.2)
    arguments = scene(model, 3)
    sparse = dense.refine_sparsely(model, *arguments)
    torch.nn.init.zeros_(context.out.weight)
    assert not torch.equal(dense.refine_sparsely(model, *arguments), sparse)  # or else it was not looked at
    torch.nn.init.normal_(context.out.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    sparse = dense.refine_sparsely(model, *arguments)
    torch.testing.assert_close(dense.refine_densely(model, *arguments), sparse, rtol=0, atol=TOLERANCE)


def test_groups_of_the_budget_change_nothing(benchmark):
    dense = benchmark("dense_reference")
    model = small_transfiner()
    arguments = scene(model, 3)
    one_by_one = dense.refine_sparsely(model, *arguments, token_budget=1)
    torch.testing.assert_close(one_by_one, dense.refine_sparsely(model, *arguments), rtol=0, atol=TOLERANCE)


def test_no_rois(benchmark):
    dense = benchmark("dense_reference")
    model = small_transfiner()
    features, rois, image, coarse, depth, select = scene(model, 3)
    out = dense.refine_densely(model, features, rois[:0], image[:0], coarse[:0], depth, select)
    assert out.shape == (0, 112, 112)


def test_a_model_without_context_is_refused(benchmark):
    model = small_transfiner(node_cues=("fine", "coarse"))
    with pytest.raises(InvalidInputError, match="expected a model with the context cue"):
        benchmark("dense_reference").refine_densely(model, *scene(model, 3))


def test_pooling_is_dense_and_has_a_rim(benchmark):
    """Every cell's own feature, and its neighbours' beyond the border, are what the sparse model samples."""
    dense = benchmark("dense_reference")
    model = small_transfiner(eventful=False)
    features, rois, image, *_ = scene(model, 3)
    pooled = dense.DensePyramid.pool(model, features, rois, image, 3)
    assert {key: grid.shape[-1] for key, grid in pooled.grids.items()} == {
        (0, 14): 16,
        (0, 28): 30,
        (1, 56): 58,
        (2, 112): 114,
    }
    sparse = model.roi_pyramid(features, rois, image)
    torch.testing.assert_close(pooled.inner(1), sparse.grid(56, 1), rtol=0, atol=TOLERANCE)
    roi, corner = torch.tensor([4]), torch.tensor([[0.5 / 56, 55.5 / 56]])  # the lower left cell
    expected = sparse.sample_context(roi, corner, 56, 1)
    torch.testing.assert_close(pooled.sample_context(roi, corner, 56, 1), expected, rtol=0, atol=TOLERANCE)


class TestCost:
    def test_a_deeper_model_begins_alike(self, benchmark):
        cost = benchmark("cost")
        torch.manual_seed(0)
        model = RefinerModel(small_config(depth=2))
        make_eventful(model.transfiner)
        deeper = cost.deepened(model)
        assert deeper.config.depth == 3
        dense = benchmark("dense_reference")
        arguments = scene(model.transfiner, 2)
        alike = dense.refine_sparsely(deeper.transfiner, *arguments)
        torch.testing.assert_close(alike, dense.refine_sparsely(model.transfiner, *arguments))
        found = deeper.transfiner(
            deeper.transfiner.roi_pyramid(*arguments[:3]), scene(deeper.transfiner, 3)[3], 3, HALF
        ).detection.quadtree
        assert len(found) == 3 and len(found[2])  # the new level has nodes

    def test_a_scene_of_another_size(self, benchmark):
        cost = benchmark("cost")
        whole = cost.make_scene(2)
        half = cost.resized(whole, 600)
        assert half.image.shape == (3, 400, 600) and half.masks.shape == (2, 400, 600)
        torch.testing.assert_close(half.boxes, whole.boxes / 2)
        assert float(half.masks.sum() / whole.masks.sum()) == pytest.approx(0.25, rel=0.02)
        sample = cost.as_sample(half, 1)
        assert sample.image.shape == (400, 600, 3) and sample.coarse.shape == (1, 400, 600)

    def test_costs_of_mask_by_mask_methods_are_multiplied(self, benchmark, monkeypatch):
        cost = benchmark("cost")
        calls = []
        # Two masks are timed: 10 seconds.
        monkeypatch.setattr(cost, "cost_of", lambda call, repeats: (call(), cost.Cost(12.0, 10.0, 7))[1])

        def method(sample):
            calls.append(len(sample))
            return sample.coarse

        refiner = Refiner(eventful_model(encoder_config(depth=1)))
        costs = cost.peer_costs(refiner, {"slow": method}, cost.make_scene(4), (1, 4), 2, 1)
        assert calls == [2] and set(costs) == {"refined", "refined, one pass, no segmenter", "slow"}
        assert costs["slow"] == {1: cost.Cost(6.0, 5.0, 7), 4: cost.Cost(24.0, 20.0, 7)}
        assert costs["refined"][4] == cost.Cost(12.0, 10.0, 7)

    def test_the_command_measures_sparse_against_dense(self, benchmark, tmp_path):
        out = tmp_path / "cost.json"
        folder = save_model(eventful_model(encoder_config(), share=0.1), tmp_path / "model")
        arguments = ("--model", str(folder), "--no-peers", "--count", "2", "--repeats", "1", "--json", str(out))
        result = run(benchmark("cost"), *arguments)
        assert result.exit_code == 0, result.output
        record = json.loads(out.read_text())
        assert max(record["differences"].values()) < 1e-4
        assert set(record["growth"]) == {"1 to 2 instances", "112 to 224 cells"}
        for name in ("sparse", "dense, pooled together", "dense, pooled one by one"):
            assert name in result.output
            assert record["network"][name]["2"]["processor_seconds"] > 0
