"""Simulated coarse masks: lawful for every shape, and as good and as bad as those of a real detector."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from transfiner_refine.data.coco import decode_masks, group_by_image, load_results
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.boundary import boundary_iou, mask_iou
from transfiner_refine.functional.rle import decode
from transfiner_refine.training.coarse import CoarseErrors, simulate_coarse

NO_ERRORS = CoarseErrors(
    untouched=0,
    one_pixel=0,
    box_head=0,
    prototype_cells=(1000, 1000),
    smoothing=(0, 0),
    displacement=0,
    offset=0,
    thinning=0,
    missing=0,
    leaks=0,
    box_noise=1e-9,
    box_slip=0,
)


def lollipop() -> np.ndarray:
    """A disc of radius 60 on a stick 5 pixels wide."""
    plane = np.zeros((260, 240), np.uint8)
    cv2.circle(plane, (120, 90), 60, 1, -1)
    plane[150:230, 118:123] = 1
    return plane.astype(bool)


def test_equal_seeds_give_equal_masks_and_leave_the_input_alone():
    mask = lollipop()
    first, second = (simulate_coarse(mask, np.random.default_rng(3)) for _ in range(2))
    assert (first.mask == second.mask).all() and (first.box == second.box).all() and (first.soft == second.soft).all()
    assert (mask == lollipop()).all()
    assert any((simulate_coarse(mask, np.random.default_rng(s)).mask != first.mask).any() for s in range(4, 8))


@pytest.mark.parametrize(
    "mask",
    [
        lollipop(),
        np.ones((40, 30), bool),
        np.pad(np.ones((1, 1), bool), 6),
        np.pad(np.ones((3, 50), bool), 12),
        np.pad(np.ones((30, 30), bool), ((0, 20), (0, 20))),
        np.eye(64, dtype=bool),
    ],
    ids=["lollipop", "fills its frame", "one pixel", "bar", "in the corner", "diagonal line"],
)
def test_result_is_lawful_for_any_shape(mask: np.ndarray):
    height, width = mask.shape
    for seed in range(60):
        made = simulate_coarse(mask, np.random.default_rng(seed))
        assert made.mask.shape == mask.shape and made.mask.dtype == np.bool_
        assert mask_iou(made.mask[None], mask[None])[0] >= 0.5
        x0, y0, x1, y1 = made.box
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        rows, columns = np.nonzero(made.mask)
        assert columns.min() + 0.5 >= x0 - 0.5 and columns.max() + 0.5 <= x1 + 0.5
        assert rows.min() + 0.5 >= y0 - 0.5 and rows.max() + 0.5 <= y1 + 0.5
        assert made.soft.shape == (28, 28) and made.soft.dtype == np.float32
        assert made.soft.min() >= 0 and made.soft.max() <= 1


def test_ground_truth_passes_untouched_or_with_a_pixel_of_noise():
    mask = lollipop()
    for seed in range(10):
        exact = simulate_coarse(mask, np.random.default_rng(seed), CoarseErrors(untouched=1, one_pixel=0))
        assert (exact.mask == mask).all()
        near = simulate_coarse(mask, np.random.default_rng(seed), CoarseErrors(untouched=0, one_pixel=1))
        wrong = near.mask != mask
        assert wrong.any()
        # No error further from the outline than about three pixels.
        rim = cv2.dilate(mask.view(np.uint8), np.ones((9, 9))) - cv2.erode(mask.view(np.uint8), np.ones((9, 9)))
        assert not (wrong & (rim == 0)).any()


def test_each_error_does_what_its_name_says():
    mask, disc = lollipop(), lollipop()
    disc[151:] = False
    stick = mask & ~disc

    def average(**change: object) -> np.ndarray:
        made = [
            simulate_coarse(mask, np.random.default_rng(seed), replace(NO_ERRORS, min_iou=0.0, **change)).mask
            for seed in range(30)
        ]
        return np.mean(made, axis=0)

    clean = average()
    assert mask_iou((clean > 0.5)[None], mask[None])[0] > 0.99
    thinned = average(thinning=1.0, thin_width=(0.1, 0.1))
    assert thinned[stick].mean() < 0.6 and thinned[disc].mean() > 0.97
    assert average(missing=2.0)[mask].mean() < 0.95
    leaked = average(leaks=2.0)
    assert leaked[~mask].mean() > 0.005 and leaked[mask].mean() > 0.995
    # A slipped side cuts straight through the object: whole rows or columns at its border are lost.
    slipped = average(box_slip=1.0, box_slip_noise=0.1)
    assert slipped[222:228, 118:123].mean() < 0.8 < slipped[disc].mean()
    coarse_grid = average(box_head=1.0)
    assert coarse_grid[stick].mean() < clean[stick].mean()


def test_soft_map_is_the_mask_in_the_box_frame():
    mask = lollipop()
    for seed in range(20):
        made = simulate_coarse(mask, np.random.default_rng(seed))
        x0, y0, x1, y1 = np.round(made.box).astype(int)
        up = np.zeros(mask.shape, bool)
        up[y0:y1, x0:x1] = cv2.resize(made.soft, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR) >= 0.5
        assert mask_iou(up[None], made.mask[None])[0] > 0.9


@pytest.mark.parametrize(
    "mask", [np.zeros((9, 9), bool), np.ones((9, 9), np.uint8), np.ones((2, 9, 9), bool)], ids=["empty", "uint8", "3-D"]
)
def test_bad_ground_truth_is_refused(mask: np.ndarray, rng: np.random.Generator):
    with pytest.raises(InvalidInputError, match=r"expected a \(H, W\) bool mask"):
        simulate_coarse(mask, rng)


def matched_pairs(root: Path, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ground truth of some objects, and the real detection that overlaps each by an IoU above one half."""
    annotations = json.loads((root / "annotations.json").read_text())["annotations"]
    results = load_results(root / "detections.json")
    groups = group_by_image(results)
    truths, reals = [], []
    for annotation in annotations[:: max(1, len(annotations) // count)]:
        size = tuple(annotation["segmentation"]["size"])
        positions = groups.get(annotation["image_id"], [])
        if annotation["area"] < 576 or not positions:
            continue
        truth = decode(annotation["segmentation"], size)
        found = decode_masks(results, positions, size)
        ious = mask_iou(np.repeat(truth[None], len(found), axis=0), found)
        if ious.max() > 0.5:
            truths.append(truth)
            reals.append(found[ious.argmax()])
    return truths, reals


def test_simulated_masks_are_as_good_as_real_ones(data_root: Path):
    """Means within 0.03, percentiles within 0.08; the fit itself is closer, on more objects."""
    truths, reals = matched_pairs(data_root / "ecssd", 300)
    errors = CoarseErrors(untouched=0, one_pixel=0)  # real detections hold no ground truth
    made = [simulate_coarse(t, np.random.default_rng([5, i]), errors).mask for i, t in enumerate(truths)]
    for measure in (mask_iou, boundary_iou):
        real, simulated = measure(truths, reals), measure(truths, made)
        assert abs(real.mean() - simulated.mean()) < 0.03
        gap = np.percentile(real, [10, 50, 90]) - np.percentile(simulated, [10, 50, 90])
        assert np.abs(gap).max() < 0.08
