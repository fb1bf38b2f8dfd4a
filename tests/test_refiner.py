"""The façade: every accepted input, equal results whatever the grouping, and one clear error for the rest."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import discs, encoder_config, eventful_model, random_image, random_pyramid, small_config
from torch import Tensor

from transfiner_refine import Instances, RefineOptions, Refiner, pipeline
from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.functional import rle
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.crops import ImageHalves
from transfiner_refine.inputs import boxes_from_masks

H, W = 90, 120
CIRCLES = [(40.0, 45.0, 25.0), (85.0, 50.0, 18.0), (104.0, 18.0, 12.0)]
FREE = RefineOptions(keep_if_iou_below=0.0)
"""Random corrections stray far from the coarse mask: accept them all."""


@pytest.fixture(scope="module")
def on_features() -> Refiner:
    """A refiner of a detector's features, depth 3."""
    return Refiner(eventful_model(small_config()))


@pytest.fixture(scope="module")
def on_images() -> Refiner:
    """A refiner with an image encoder, depth 2."""
    return Refiner(eventful_model(encoder_config(depth=2)))


@pytest.fixture
def masks() -> Tensor:
    return discs(H, W, CIRCLES)


@pytest.fixture
def image() -> np.ndarray:
    return random_image(H, W)


def refine_features(refiner: Refiner, masks: Any, options: RefineOptions = FREE, **changes) -> Instances:
    values = {"features": random_pyramid(H, W), "image_size": (H, W), "masks": masks, "options": options}
    return refiner.refine(**(values | changes))


def assert_same(a: Instances, b: Instances) -> None:
    assert a.probs is not None and b.probs is not None
    torch.testing.assert_close(a.probs, b.probs, rtol=0, atol=1e-4)
    assert torch.equal(a.masks, b.masks)
    assert torch.equal(a.boxes, b.boxes)


def assert_refined(out: Instances, coarse: Tensor) -> None:
    changed = (out.masks != coarse).sum(dim=(1, 2))
    assert (changed > 0).all() and changed.sum() > 30, changed.tolist()


class TestImages:
    @pytest.fixture
    def palette(self, image: np.ndarray) -> Image.Image:
        return Image.fromarray(image).quantize(64, dither=Image.Dither.NONE)

    def test_every_form_gives_equal_results(
        self, on_images: Refiner, masks: Tensor, palette: Image.Image, tmp_path: Path
    ):
        rgb = palette.convert("RGB")
        rgba = rgb.copy()
        rgba.putalpha(7)
        path = tmp_path / "image.png"
        rgb.save(path)
        tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
        expected = on_images.refine(path, masks=masks, options=FREE)
        assert_refined(expected, masks)
        for form in (str(path), rgb, rgba, palette, np.array(rgb), tensor, tensor.float() / 255):
            out = on_images.refine(form, masks=masks, options=FREE)
            assert torch.equal(out.masks, expected.masks) and torch.equal(out.probs, expected.probs)  # type: ignore

    def test_grey_is_the_same_image_in_three_channels(self, on_images: Refiner, image: np.ndarray, masks: Tensor):
        grey = Image.fromarray(image).convert("L")
        expected = on_images.refine(grey.convert("RGB"), masks=masks, options=FREE)
        for form in (grey, np.array(grey)):
            assert torch.equal(on_images.refine(form, masks=masks, options=FREE).masks, expected.masks)


class TestMasks:
    def test_every_form_gives_equal_results(self, on_features: Refiner, masks: Tensor):
        expected = refine_features(on_features, masks)
        assert_refined(expected, masks)
        binary = masks.numpy()
        runs = rle.encode(binary)
        uncompressed = [{"size": [H, W], "counts": column_runs(mask)} for mask in binary]
        forms = [binary, binary.astype(np.uint8), 255 * binary.astype(np.uint8), masks.float(), list(binary)]
        for form in (*forms, runs, uncompressed):
            assert_same(refine_features(on_features, form), expected)

    def test_polygons_are_the_masks_that_they_draw(self, on_features: Refiner):
        drawn = torch.zeros(2, H, W, dtype=torch.bool)
        drawn[0, 10:70, 5:60] = drawn[0, 75:85, 20:30] = drawn[1, 20:80, 70:110] = True
        polygons = [
            [[5.0, 10.0, 60.0, 10.0, 60.0, 70.0, 5.0, 70.0], [20, 75, 30, 75, 30, 85, 20, 85]],
            [[70.0, 20.0, 110.0, 20.0, 110.0, 80.0, 70.0, 80.0]],
        ]
        out = refine_features(on_features, polygons)
        assert_same(out, refine_features(on_features, drawn))
        assert_refined(out, drawn)

    def test_box_frame_is_the_image_frame_where_their_pixels_agree(self, on_features: Refiner):
        """A box of 28 × 28 pixels whose mask has 28 × 28 cells: one mask, said twice."""
        masks = discs(H, W, [(34.0, 44.0, 11.0)])
        boxes = torch.tensor([[20.0, 30.0, 48.0, 58.0]])
        expected = refine_features(on_features, masks, boxes=boxes)
        out = refine_features(on_features, masks[:, 30:58, 20:48].float(), boxes=boxes, mask_frame="box")
        assert_same(out, expected)
        assert_refined(out, masks)

    def test_soft_masks_are_read_as_probabilities(self, on_features: Refiner, masks: Tensor):
        soft = masks.float() * 0.4 + 0.3
        out = refine_features(on_features, soft, replace(FREE, incoherence_threshold=1.0))
        assert out.probs is not None and torch.equal(out.masks, masks)
        middle = out.probs.shape[-1] // 2
        torch.testing.assert_close(out.probs[:, middle, middle], torch.full((3,), 0.7))

    def test_mask_threshold_decides_both_masks(self, on_features: Refiner, masks: Tensor):
        soft = masks.float() * 0.4 + 0.3  # 0.3 or 0.7
        for threshold, expected in ((0.2, torch.ones_like(masks)), (0.6, masks), (0.8, torch.zeros_like(masks))):
            options = replace(FREE, mask_threshold=threshold, incoherence_threshold=1.0)
            boxes = boxes_from_masks(masks)
            assert torch.equal(refine_features(on_features, soft, options, boxes=boxes).masks, expected)

    def test_boxes_are_taken_from_the_masks(self, on_features: Refiner, masks: Tensor):
        out = refine_features(on_features, masks)
        boxes = torch.tensor([[x - r, y - r, x + r, y + r] for x, y, r in CIRCLES])
        assert torch.equal(out.boxes, boxes)
        assert_same(out, refine_features(on_features, masks, boxes=boxes.numpy()))
        assert out.rois is not None and torch.equal(out.rois, expand_boxes(boxes, 0.125))


class TestInstances:
    def test_labels_and_scores_pass_through(self, on_features: Refiner, masks: Tensor):
        out = refine_features(on_features, masks, labels=[3, 1, 7], scores=np.array([0.9, 0.1, 0.5]))
        assert out.labels is not None and out.labels.tolist() == [3, 1, 7]
        assert out.scores is not None
        torch.testing.assert_close(out.scores, torch.tensor([0.9, 0.1, 0.5]))
        bare = refine_features(on_features, masks)
        assert bare.labels is None and bare.scores is None
        assert bare.details is None and bare.image_size == (H, W)

    @pytest.mark.parametrize("encode", ["auto", "image", "crops"])
    @pytest.mark.parametrize("details", [True, False])
    def test_no_instances_on_an_image(self, on_images: Refiner, image: np.ndarray, encode: Any, details: bool):
        options = RefineOptions(encode=encode, return_quadtree=details)
        for masks in (np.zeros((0, H, W), bool), []):
            out = on_images.refine(image, masks=masks, boxes=np.zeros((0, 4)), options=options)
            assert len(out) == 0 and out.masks.shape == (0, H, W)
            assert out.probs is not None and out.probs.shape == (0, 56, 56)
        assert out.to_coco(1) == []

    def test_no_instances_on_features(self, on_features: Refiner):
        out = refine_features(on_features, [], RefineOptions(return_quadtree=True))
        assert len(out) == 0 and out.masks.shape == (0, H, W) and out.details is not None and len(out.details) == 0
        box_frame = refine_features(on_features, np.zeros((0, 28, 28)), boxes=np.zeros((0, 4)), mask_frame="box")
        assert len(box_frame) == 0

    def test_what_cannot_be_refined_comes_back_unchanged_and_disturbs_no_other(
        self, on_features: Refiner, masks: Tensor
    ):
        expected = refine_features(on_features, masks)
        boxes = boxes_from_masks(masks)
        empty, full = torch.zeros(1, H, W, dtype=torch.bool), torch.ones(1, H, W, dtype=torch.bool)
        outside = torch.tensor([[-40.0, -40.0, 0.0, 0.0]])  # but for its margin
        mixed = torch.cat([empty, masks[:2], full, masks[2:]])
        mixed_boxes = torch.cat([torch.tensor([[3.0, 4.0, 50.0, 60.0]]), boxes[:2], outside, boxes[2:]])
        out = refine_features(on_features, mixed, boxes=mixed_boxes)
        assert torch.equal(out.masks[[0, 3]], mixed[[0, 3]])
        assert out.probs is not None and not out.probs[[0, 3]].any()
        assert_same(out[[1, 2, 4]], expected)
        assert out.kept_coarse is not None and not out.kept_coarse.any()

    def test_an_empty_mask_without_a_box(self, on_features: Refiner, masks: Tensor):
        empty = torch.zeros(1, H, W, dtype=torch.bool)
        out = refine_features(on_features, torch.cat([empty, masks]), replace(FREE, return_quadtree=True))
        assert not out.masks[0].any() and out.boxes[0].tolist() == [0, 0, 0, 0]
        assert_same(out[1:], refine_features(on_features, masks))

    def test_only_empty_masks(self, on_images: Refiner, image: np.ndarray):
        out = on_images.refine(image, masks=np.zeros((2, H, W), bool))
        assert len(out) == 2 and not out.masks.any()

    def test_boxes_across_the_border(self, on_images: Refiner, on_features: Refiner, image: np.ndarray):
        circles = [(0.0, 0.0, 30.0), (120.0, 45.0, 40.0), (60.0, 90.0, 50.0)]
        masks = discs(H, W, circles)
        boxes = np.array([[x - r, y - r, x + r, y + r] for x, y, r in circles])
        for out in (
            on_images.refine(image, masks=masks, boxes=boxes, options=FREE),
            refine_features(on_features, masks, boxes=boxes),
        ):
            assert_refined(out, masks)
            assert torch.equal(out.boxes, torch.from_numpy(boxes).float())

    def test_order_does_not_matter(self, on_features: Refiner, on_images: Refiner, image: np.ndarray, masks: Tensor):
        order = [2, 0, 1]
        assert_same(refine_features(on_features, masks[order]), refine_features(on_features, masks)[order])
        for encode in ("crops", "image"):
            options = replace(FREE, encode=encode)
            permuted = on_images.refine(image, masks=masks[order], options=options)
            assert_same(permuted, on_images.refine(image, masks=masks, options=options)[order])

    def test_inputs_are_kept(self, on_images: Refiner, on_features: Refiner, image: np.ndarray, masks: Tensor):
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        pyramid, boxes = random_pyramid(H, W), boxes_from_masks(masks)
        given = [pixels, masks, boxes, masks.float(), *pyramid.maps]
        before = [tensor.clone() for tensor in given]
        for encode in ("crops", "image"):
            on_images.refine(pixels, masks=masks, boxes=boxes, options=replace(FREE, encode=encode))
        for coarse in (masks, given[3]):
            out = refine_features(on_features, coarse, features=pyramid, boxes=boxes)
            out.masks.fill_(True)  # the result is the caller's own
        on_images.refine_batch([pixels], [Instances(boxes, masks, (H, W))], options=FREE)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))

    def test_results_carry_no_gradient(self, on_features: Refiner, masks: Tensor):
        out = refine_features(on_features, masks)
        assert out.probs is not None and not out.probs.requires_grad and not on_features.model.training


class TestOptions:
    @pytest.mark.parametrize("token_budget", [1, 1500])
    def test_token_budget_cannot_change_a_result(self, on_features: Refiner, masks: Tensor, token_budget: int):
        many = torch.cat([masks, masks.flip(2), masks.flip(1)])
        options = replace(FREE, token_budget=token_budget)
        assert_same(refine_features(on_features, many, options), refine_features(on_features, many))

    def test_token_budget_cannot_change_a_result_of_crops(self, on_images: Refiner, image: np.ndarray, masks: Tensor):
        options = replace(FREE, encode="crops")
        small = on_images.refine(image, masks=masks, options=replace(options, token_budget=2048))
        assert_same(small, on_images.refine(image, masks=masks, options=options))

    def test_masks_that_stray_are_replaced_and_flagged(self, on_features: Refiner, masks: Tensor):
        free = refine_features(on_features, masks)
        assert free.kept_coarse is not None and not free.kept_coarse.any()
        strict = refine_features(on_features, masks, RefineOptions(keep_if_iou_below=1.0))
        assert torch.equal(strict.masks, masks)
        assert strict.kept_coarse is not None and strict.kept_coarse.all()
        refused = refine_features(on_features, masks, RefineOptions(keep_if_iou_below=1.0, incoherence_threshold=1.0))
        assert strict.probs is not None and refused.probs is not None
        assert torch.equal(strict.probs, refused.probs)  # the coarse probabilities
        assert refused.kept_coarse is not None and not refused.kept_coarse.any()  # nothing strayed

    def test_only_the_mask_that_strays_is_replaced(self, on_features: Refiner, masks: Tensor):
        free = refine_features(on_features, masks)
        iou = (free.masks & masks).sum((1, 2)) / (free.masks | masks).sum((1, 2))
        limit = float(iou.sort().values[:2].mean())  # between the worst and the next
        out = refine_features(on_features, masks, RefineOptions(keep_if_iou_below=limit))
        assert out.kept_coarse is not None and torch.equal(out.kept_coarse, iou == iou.min())
        worst = int(iou.argmin())
        assert torch.equal(out.masks[worst], masks[worst])
        others = [i for i in range(3) if i != worst]
        assert torch.equal(out.masks[others], free.masks[others])

    def test_pixels_outside_of_incoherent_cells_keep_their_label(self, on_features: Refiner):
        """Coarse masks finer than the grid, so that rewriting an untouched cell would lose its detail."""
        masks = discs(H, W, CIRCLES) & (torch.rand(3, H, W) < 0.7)
        boxes = torch.tensor([[x - r, y - r, x + r, y + r] for x, y, r in CIRCLES])
        out = refine_features(on_features, masks, replace(FREE, return_quadtree=True), boxes=boxes)
        assert out.details is not None and out.rois is not None
        root = out.details.quadtree[0]
        touched = torch.zeros(3, 28, 28, dtype=torch.bool)
        touched[root.roi, root.row, root.col] = True
        x, y = torch.arange(W) + 0.5, torch.arange(H) + 0.5
        cell = (out.rois[:, 2:] - out.rois[:, :2]) / 28  # (N, 2)
        col = ((x - out.rois[:, :1]) / cell[:, :1]).floor().long()  # (N, W)
        row = ((y - out.rois[:, 1:2]) / cell[:, 1:]).floor().long()  # (N, H)
        inside = ((row >= 0) & (row < 28))[:, :, None] & ((col >= 0) & (col < 28))[:, None]
        n = torch.arange(3)[:, None, None]
        may_change = inside & touched[n, row.clamp(0, 27)[:, :, None], col.clamp(0, 27)[:, None]]
        changed = out.masks != masks
        assert changed.any(dim=(1, 2)).all() and not (changed & ~may_change).any()

    def test_depth_by_the_size_of_each_box(self, on_features: Refiner):
        """Boxes of 20, 44 and 88 pixels: their cells are smaller than a pixel from level 0, 1 and 2 on."""
        masks = discs(H, W, [(15.0, 15.0, 10.0), (90.0, 40.0, 22.0), (60.0, 45.0, 44.0)])
        options = replace(FREE, return_quadtree=True)
        every = refine_features(on_features, masks, options).details
        needed = refine_features(on_features, masks, replace(options, depth="auto")).details
        assert every is not None and needed is not None
        for level in range(3):
            found, expected = (torch.bincount(x.quadtree[level].roi, minlength=3) for x in (needed, every))
            assert (expected > 0).all()
            assert torch.equal(found[level:], expected[level:]) and not found[:level].any()

    def test_depth(self, on_features: Refiner, masks: Tensor):
        for depth in range(4):
            out = refine_features(on_features, masks, replace(FREE, depth=depth, return_quadtree=True))
            side = 28 << max(depth - 1, 0)
            assert out.probs is not None and out.probs.shape == (3, side, side)
            assert out.details is not None and len(out.details.quadtree) == depth
            assert torch.equal(out.masks, masks) == (depth == 0)

    def test_max_nodes(self, on_features: Refiner, masks: Tensor):
        out = refine_features(on_features, masks, replace(FREE, max_nodes=5, return_quadtree=True))
        assert out.details is not None
        for level in out.details.quadtree:
            assert torch.bincount(level.roi, minlength=3).max() <= 5
        assert len(out.details.quadtree[0]) == 15


class TestQuadtree:
    @pytest.mark.parametrize("token_budget", [1, 2048, 1 << 30])
    def test_parents_are_nodes_across_groups(self, on_features: Refiner, masks: Tensor, token_budget: int):
        many = torch.cat([masks, torch.zeros(1, H, W, dtype=torch.bool), masks.flip(2)])  # one that cannot be refined
        options = replace(FREE, token_budget=token_budget, return_quadtree=True)
        details = refine_features(on_features, many, options).details
        assert details is not None and len(details) == 7
        assert [level.side for level in details.quadtree] == [28, 56, 112]
        assert (details.quadtree[0].parent == -1).all()
        for parents, children in pairwise(details.quadtree):
            assert len(children) and torch.equal(parents.roi[children.parent], children.roi)
            assert torch.equal(parents.row[children.parent], children.row // 2)
            assert torch.equal(parents.col[children.parent], children.col // 2)
        assert set(details.quadtree[0].roi.tolist()) == {0, 1, 2, 4, 5, 6}
        root = details.quadtree[0]
        torch.testing.assert_close(details.incoherence[root.roi, root.row, root.col], root.logits.sigmoid())
        whole = refine_features(on_features, many, replace(FREE, return_quadtree=True)).details
        assert whole is not None
        torch.testing.assert_close(details.coarse_probs, whole.coarse_probs)
        for level in range(3):
            assert torch.equal(*(node_table(d, level)[0] for d in (details, whole)))
            torch.testing.assert_close(*(node_table(d, level)[1] for d in (details, whole)), rtol=0, atol=1e-4)

    def test_asking_for_it_changes_nothing(self, on_images: Refiner, image: np.ndarray, masks: Tensor):
        for encode in ("crops", "image"):
            options = replace(FREE, encode=encode)
            with_details = on_images.refine(image, masks=masks, options=replace(options, return_quadtree=True))
            assert_same(with_details, on_images.refine(image, masks=masks, options=options))


def node_table(details: Any, level: int) -> tuple[Tensor, Tensor]:
    """Cells and probabilities of a level's nodes in one order, whatever the grouping."""
    nodes = details.quadtree[level]
    key = (nodes.roi * nodes.side + nodes.row) * nodes.side + nodes.col
    order = key.argsort()
    return key[order], details.node_probs[level][order]


def column_runs(mask: np.ndarray) -> list[int]:
    """Uncompressed COCO counts: alternating run lengths down the columns, background first."""
    flat = mask.T.reshape(-1)
    ends = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    runs = np.diff(ends).tolist()
    return [0, *runs] if flat[0] else runs


def test_a_call_may_have_a_margin_of_its_own(on_images: Refiner, image: np.ndarray, masks: Tensor):
    boxes = boxes_from_masks(masks)
    for margin in (0.0, 0.25, 1.0):
        out = on_images.refine(image, masks=masks, options=replace(FREE, passes=1, box_margin=margin))
        assert out.rois is not None
        torch.testing.assert_close(out.rois, expand_boxes(boxes, margin))
    model_s = on_images.refine(image, masks=masks, options=FREE)
    same = on_images.refine(image, masks=masks, options=replace(FREE, box_margin=on_images.config.box_margin))
    assert_same(model_s, same)
    with pytest.raises(InvalidInputError, match="box_margin from 0 to 1"):
        RefineOptions(box_margin=1.5)


def test_a_box_far_beyond_the_image_costs_no_more_than_one_that_reaches_as_far_as_the_image(on_images: Refiner):
    """A wrong box of 200,000 pixels used to take all memory."""
    mask = discs(H, W, CIRCLES[:1])
    near, far = (
        on_images.refine(random_image(H, W), boxes=box, masks=mask, options=FREE)
        for box in ([[-W, -H, 2 * W, 2 * H]], [[-1e5, -1e5, 1e5, 1e5]])
    )
    assert near.rois is not None and far.rois is not None and torch.equal(near.rois, far.rois)
    assert torch.equal(near.masks, far.masks) and far.boxes.tolist() == [[-1e5, -1e5, 1e5, 1e5]]
    outside = on_images.refine(random_image(H, W), boxes=[[1e4, 1e4, 2e4, 2e4]], masks=mask, options=FREE)
    assert torch.equal(outside.masks, mask) and outside.boxes.tolist() == [[1e4, 1e4, 2e4, 2e4]]


def test_a_caller_s_autocast_does_not_round_predicted_gains():
    refiner, image = Refiner.from_pretrained(), random_image(H, W)
    mask = discs(H, W, CIRCLES[:1])
    with torch.autocast("cpu", torch.bfloat16):
        out = refiner.refine(image, masks=mask)
    expected = refiner.refine(image, masks=mask)
    assert out.predicted_gain is not None and expected.predicted_gain is not None
    assert out.predicted_gain.dtype == torch.float32
    torch.testing.assert_close(out.predicted_gain, expected.predicted_gain, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_of_any_strides(on_images: Refiner, image: np.ndarray, masks: Tensor, dtype: torch.dtype):
    last = masks.to(dtype).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as frameworks that put channels last
    assert not last.is_contiguous()
    assert_same(
        on_images.refine(image, masks=last, options=FREE), on_images.refine(image, masks=masks.to(dtype), options=FREE)
    )


def test_an_empty_mask_changes_no_other_and_costs_nothing(
    on_images: Refiner, image: np.ndarray, masks: Tensor, monkeypatch: pytest.MonkeyPatch
):
    alone = on_images.refine(image, masks=masks[:1], options=FREE)
    with_empty = torch.cat([masks[:1], torch.zeros(12, H, W, dtype=torch.bool)])
    boxes = torch.cat([boxes_from_masks(masks[:1]), torch.tensor([[10.0, 10, 60, 60]]).expand(12, 4)])
    together = on_images.refine(image, boxes=boxes, masks=with_empty, options=FREE)
    assert_same(together[[0]], alone)
    assert not together.masks[1:].any()
    again = on_images.refine(image, masks=on_images.refine(image, masks=with_empty, options=FREE).masks, options=FREE)
    assert on_images.refine(image, boxes=again.boxes, masks=again.masks, options=FREE).boxes[1:].eq(0).all()
    monkeypatch.setattr(on_images.model.transfiner, "forward", None)
    on_images.refine(image, masks=with_empty[1:], options=FREE)


def test_the_first_mask_bounds_how_far_later_passes_stray(on_images: Refiner, image: np.ndarray):
    """Each pass alone may keep half of the mask that it starts from; all of them together may not lose more."""
    mask = discs(H, W, [(60.0, 45.0, 40.0)])
    for passes in (1, 2, 3, 4):
        options = RefineOptions(passes=passes, keep_if_iou_below=0.6, again_if_iou_below=1.0)
        out = on_images.refine(image, masks=mask, options=options)
        iou = float((out.masks & mask).sum() / (out.masks | mask).sum())
        assert iou >= 0.55, f"{passes} passes: {iou}"  # of cells, which pixels follow nearly


def test_boxes_are_those_of_the_mask_threshold(on_images: Refiner, image: np.ndarray, masks: Tensor):
    soft = masks[:1].float() * 0.4
    out = on_images.refine(image, masks=soft, options=replace(FREE, mask_threshold=0.3))
    assert torch.equal(out.boxes, boxes_from_masks(masks[:1]))


@pytest.mark.parametrize("encode", ["image", "crops"])
def test_a_batch_holds_the_pixels_of_the_photos_at_work_alone(
    on_images: Refiner, masks: Tensor, monkeypatch: pytest.MonkeyPatch, encode: Any
):
    photos = [random_image(H, W, seed) for seed in range(8)]
    instances = [Instances(boxes_from_masks(masks[:1]), masks[:1], (H, W))] * len(photos)
    options = replace(FREE, encode=encode, passes=2)
    alone = [on_images.refine(x, masks=masks[:1], options=options) for x in photos]
    made: list[ImageHalves] = []

    class Watched(ImageHalves):
        def __init__(self, pixels: Tensor):
            super().__init__(pixels)
            made.append(self)

    monkeypatch.setattr(pipeline, "ImageHalves", Watched)
    held: list[int] = []
    hook = on_images.model.transfiner.register_forward_pre_hook(
        lambda *_: held.append(sum(bool(x._levels) for x in made))
    )
    together = on_images.refine_batch(photos, instances, options=options)
    hook.remove()
    # A group has at most six instances, and so six photos; the last of the group before may be held beside it.
    assert len(made) == 8 and 0 < max(held) <= (2 if encode == "image" else 7)
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("encode", ["image", "crops"])
def test_a_caller_s_default_dtype_changes_nothing(on_images: Refiner, image: np.ndarray, masks: Tensor, encode: Any):
    options = replace(FREE, encode=encode, return_quadtree=True)
    expected = on_images.refine(image, masks=masks, options=options)
    torch.set_default_dtype(torch.float64)
    try:
        found = on_images.refine(image, masks=masks, options=options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.probs is not None and found.probs.dtype == torch.float32
    assert_same(found, expected)
    assert found.details is not None and found.details.incoherence.dtype == torch.float32


def test_what_goes_along_is_checked_before_the_work(
    on_images: Refiner, image: np.ndarray, masks: Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(on_images.model.transfiner, "forward", None)
    for labels, scores in ((["cat"] * 3, None), ([1, 2], None), (None, [0.5])):
        with pytest.raises(InvalidInputError, match=r"labels|scores"):
            on_images.refine(image, masks=masks, labels=labels, scores=scores)
    with pytest.raises(InvalidInputError, match="options as RefineOptions, got dict"):
        on_images.refine(image, masks=masks, options={"depth": 1})  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="Instances for each image, got dict"):
        on_images.refine_batch([image], [{"masks": masks}])  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="a FeaturePyramid, got list"):
        on_images.refine(features=[masks], masks=masks, image_size=(H, W))  # type: ignore[arg-type]


def test_weights_that_cannot_be_stored_are_refused(tmp_path: Path):
    model = eventful_model(small_config())
    with torch.no_grad():
        model.transfiner.pixel_decoder.layers[2].bias.fill_(1e5)  # type: ignore[operator]
    with pytest.raises(WeightsError, match=r"finite weights within the range of torch.float16"):
        Refiner(model).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="a directory to save to"):
        Refiner(eventful_model(small_config())).save_pretrained(tmp_path / "file")
