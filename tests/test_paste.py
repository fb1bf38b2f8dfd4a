"""Between the image and the RoI: masks cropped and pasted, windows cut out of an image."""

import math

import cv2
import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from torch.nn import functional as F

from transfiner_refine.functional import paste as paste_module
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.crops import OUTSIDE, ImageHalves, crop_image
from transfiner_refine.functional.paste import crop_box_masks, crop_masks, paste


def iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum()).item()


def shapes() -> Tensor:
    """Outlines as objects have them: a star, a ring, a limb a few pixels wide, a leaf across the border."""
    masks = np.zeros((4, 300, 400), np.uint8)
    angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    radius = np.where(np.arange(40) % 4 < 2, 120, 75)
    star = np.stack([200 + radius * np.cos(angle), 150 + radius * np.sin(angle)], axis=1)
    cv2.fillPoly(masks[0], [star.astype(np.int32)], 1)
    cv2.ellipse(masks[1], (150, 140), (120, 80), 30.0, 0.0, 360.0, 1, -1)
    cv2.ellipse(masks[1], (170, 130), (40, 25), -10.0, 0.0, 360.0, 0, -1)
    cv2.circle(masks[2], (200, 100), 60, 1, -1)
    cv2.line(masks[2], (200, 150), (260, 280), 1, 9)
    cv2.ellipse(masks[3], (20, 290), (140, 50), -35.0, 0.0, 360.0, 1, -1)
    return torch.from_numpy(masks).bool()


def rois_of(masks: Tensor, margin: float = 0.1) -> Tensor:
    boxes = []
    for mask in masks:
        row, col = mask.nonzero().unbind(dim=1)
        boxes.append([col.min(), row.min(), col.max() + 1, row.max() + 1])
    return expand_boxes(torch.tensor(boxes).float(), margin)


def test_crop_and_paste_are_inverses():
    """Measured, least of the four shapes: IoU 0.997 at side 112 and 0.966 at side 28."""
    masks = shapes()
    for side, least in [(112, 0.99), (28, 0.94)]:
        back = torch.zeros_like(masks)
        paste(crop_masks(masks, rois_of(masks), side), rois_of(masks), back)
        assert min(iou(a, b) for a, b in zip(masks, back, strict=True)) > least
    # A probability of one half lies on the outline: the same area, neither grown nor shrunk.
    assert (back.sum(dim=(1, 2)) / masks.sum(dim=(1, 2)) - 1).abs().max() < 0.02


def test_crop_reads_probabilities_and_zeros_beyond_the_image():
    probs = torch.full((1, 10, 10), 0.25)
    cropped = crop_masks(probs, torch.tensor([[-10.0, 0.0, 10.0, 10.0]]), 10)
    assert cropped.dtype == torch.float32
    assert cropped[0, :, :4].eq(0).all() and cropped[0, :, 5:].eq(0.25).all()
    assert crop_masks(probs[:0], torch.zeros(0, 4), 10).shape == (0, 10, 10)
    assert crop_masks(probs, torch.tensor([[3.0, 3.0, 3.0, 3.0]]), 4).isfinite().all()


def test_box_masks_move_into_wider_and_shifted_rois():
    probs = torch.rand((2, 8, 8), generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 20.0, 26.0, 52.0], [-8.0, 0.0, 0.0, 8.0]])
    assert crop_box_masks(probs, boxes, boxes, 8).sub(probs).abs().max() < 1e-6
    wide = crop_box_masks(probs, boxes, expand_boxes(boxes, 0.5), 16)  # twice the box: cells as large as before
    torch.testing.assert_close(wide[:, 4:12, 4:12], probs)
    wide[:, 4:12, 4:12] = 0
    assert wide.eq(0).all()
    halves = crop_box_masks(torch.ones(2, 8, 8), boxes, boxes + torch.tensor([[8.0, 0, 8, 0], [4, 0, 4, 0]]), 8)
    assert halves[:, :, :4].eq(1).all() and halves[:, :, 4:].eq(0).all()
    assert crop_box_masks(probs[:0], boxes[:0], boxes[:0], 8).shape == (0, 8, 8)


def test_paste_writes_the_pixels_whose_centre_is_inside():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    paste(torch.ones(3, 4, 4), torch.tensor([[1.5, 1.6, 4.5, 3.4], [-9, -9, 2, 2], [7, 4, 99, 99]]), masks)
    expected = torch.zeros_like(masks)
    expected[0, 2:3, 1:4] = expected[1, :2, :2] = expected[2, 4:, 7:] = True
    assert masks.equal(expected)


def test_paste_ignores_boxes_outside_or_without_area():
    masks = torch.eye(8).bool().repeat(5, 1, 1)
    boxes = [[20.0, 0, 30, 5], [-9, -9, -1, -1], [3, 3, 3, 3], [3, 0, 3, 8], [3.6, 0, 4.4, 8]]
    paste(torch.ones(5, 4, 4), torch.tensor(boxes), masks)
    assert masks.equal(torch.eye(8).bool().repeat(5, 1, 1))


def test_paste_clears_as_well_as_sets_and_takes_the_threshold():
    probs = torch.tensor([[[0.2, 0.4], [0.6, 0.8]]]).repeat_interleave(3, 1).repeat_interleave(3, 2)
    for threshold, kept in [(0.1, 36), (0.5, 18), (0.9, 0)]:
        masks = torch.ones(1, 6, 6, dtype=torch.bool)
        paste(probs, torch.tensor([[0.0, 0, 6, 6]]), masks, threshold)
        assert masks.sum() == kept


def test_paste_leaves_pixels_of_other_cells_as_they_are():
    where = torch.zeros(1, 4, 4, dtype=torch.bool)
    where[0, 1, 2] = True
    rois, before = torch.tensor([[2.0, 2, 14, 14]]), torch.eye(16).bool()[None]
    masks = before.clone()
    paste(torch.ones(1, 4, 4), rois, masks, where=where)
    expected = before.clone()
    expected[0, 5:8, 8:11] = True  # cells of three pixels
    assert masks.equal(expected)
    untouched, everywhere, default = before.clone(), before.clone(), before.clone()
    paste(torch.ones(1, 4, 4), rois, untouched, where=torch.zeros_like(where))
    paste(torch.ones(1, 4, 4), rois, everywhere, where=torch.ones_like(where))
    paste(torch.ones(1, 4, 4), rois, default)
    assert untouched.equal(before) and everywhere.equal(default)


def test_paste_keeps_the_detail_of_pixels_whose_label_is_not_refined():
    """A mask with single pixels that its cells average away; one cell is refined, another only a little."""
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, ::3, ::3] = True
    rois = torch.tensor([[0.0, 0, 16, 16]])
    before = crop_masks(masks, rois, 4)
    refined, kept = before.clone(), masks.clone()
    paste(refined, rois, kept, where=torch.ones(1, 4, 4, dtype=torch.bool), before=before)
    assert kept.equal(masks)
    refined[0, 1, 1] = 1.0
    paste(refined, rois, kept, before=before)
    changed = (kept != masks).nonzero()[:, 1:]
    assert kept[0, 4:8, 5:7].all() and kept[0, 5:7, 4:8].all() and len(changed) > 8
    assert changed.min() >= 2 and changed.max() < 10  # bilinear: half a cell beyond the refined one
    near, doubtful = torch.full((1, 4, 4), 0.45), torch.full((1, 4, 4), 0.55)
    paste(doubtful, rois, kept := masks.clone(), before=near)
    assert kept.equal(masks)
    paste(doubtful, rois, kept, before=near - 0.1)
    assert kept.all()


def test_only_pixels_that_refinement_moved_are_written():
    """The cells that are looked at leave none out: against pasting all probabilities, new and old."""
    generator = torch.Generator().manual_seed(2)
    rois = torch.tensor([[3.3, 1.2, 50.7, 40.1], [-4.0, 10.0, 30.0, 61.5]])
    before = torch.rand(2, 28, 28, generator=generator)
    refined = torch.where(torch.rand(2, 28, 28, generator=generator) < 0.05, 1 - before, before)
    masks = torch.rand(2, 48, 56, generator=generator) < 0.5
    values = [torch.zeros(2, 48, 56) for _ in range(2)]
    for probs, target in zip((refined, before), values, strict=True):
        paste(probs, rois, target)
    new, old = values
    moved = (new - old).abs() > paste_module.LEAST_CHANGE
    expected = torch.where(moved, new >= 0.5, masks)
    paste(refined, rois, masks, before=before)
    assert 100 < moved.sum() < 1000 and masks.equal(expected)


def test_a_pixel_that_its_cell_outvoted_goes_with_the_cell():
    """A lone pixel of a mask whose cell was background already: where refinement is surer of it, the pixel goes."""
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, 4:8, 4:6] = True  # half of a cell
    masks[0, 12, 12] = True
    rois = torch.tensor([[0.0, 0, 16, 16]])
    before = crop_masks(masks, rois, 4) * 0.9
    refined = before.clone()
    refined[0, 1, 1] = 0.0
    paste(refined, rois, masks, before=before)
    assert not masks[0, :8, :8].any() and masks.sum() == 1


@pytest.mark.parametrize("pixels", [1, 37, 1000])
def test_groups_that_bound_memory_change_nothing(monkeypatch: pytest.MonkeyPatch, pixels: int):
    masks, generator = shapes()[:, ::4, ::4].contiguous(), torch.Generator().manual_seed(0)
    rois, where = rois_of(masks), torch.rand((4, 28, 28), generator=generator) < 0.7

    def round_trip() -> tuple[Tensor, Tensor]:
        cropped, back = crop_masks(masks, rois, 28), torch.zeros_like(masks)
        paste(cropped, rois, back, where=where)
        return cropped, back

    cropped, back = round_trip()
    monkeypatch.setattr(paste_module, "PASTE_PIXELS", pixels)
    monkeypatch.setattr(paste_module, "CROP_PIXELS", pixels)
    small_cropped, small_back = round_trip()
    assert small_cropped.equal(cropped) and small_back.equal(back)


def test_pasting_needs_no_more_pixels_at_once_than_agreed(monkeypatch: pytest.MonkeyPatch):
    """Each group of lines is looked up at once: no look-up is larger than the limit, however large the RoIs."""
    seen = []
    original = paste_module.bilinear_rows
    monkeypatch.setattr(paste_module, "PASTE_PIXELS", 500)
    monkeypatch.setattr(paste_module, "bilinear_rows", lambda x, *rest: seen.append(len(x)) or original(x, *rest))
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    paste(torch.ones(3, 28, 28), torch.tensor([[0.0, 0, 60, 40], [5, 5, 9, 9], [-5, 3, 40, 44]]), masks)
    assert sum(seen) == masks.sum() == 60 * 40 + 16 + 40 * 37
    assert max(seen) <= 500 and len(seen) <= 12


def test_paste_into_some_of_many_masks():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 28, 28, generator=generator)
    rois = torch.tensor([[3.0, 2.0, 30.0, 21.0], [-4.0, 5.0, 18.0, 50.0]])
    masks = torch.rand(4, 40, 33, generator=generator) > 0.5
    chosen, index = masks[[3, 1]], torch.tensor([3, 1])
    expected = masks.clone()
    paste(probs, rois, chosen)
    expected[index] = chosen
    paste(probs, rois, masks, index=index)
    assert masks.equal(expected)


def test_crop_and_paste_mutate_nothing_else():
    masks = shapes()
    probs, rois, where = torch.rand(4, 8, 8), rois_of(masks), torch.rand(4, 8, 8) < 0.5
    before = [tensor.clone() for tensor in (masks, probs, rois, where)]
    crop_masks(masks, rois, 8)
    crop_box_masks(probs, rois, expand_boxes(rois, 0.3), 8)
    paste(probs, rois, torch.zeros_like(masks), where=where)
    assert all(a.equal(b) for a, b in zip((masks, probs, rois, where), before, strict=True))
    paste(probs[:0], rois[:0], masks[:0])  # no instances


# Against the slow reference

BOXES = torch.tensor(
    [
        [5.2, 3.7, 30.9, 28.4],  # plain
        [3.5, 2.5, 11.5, 10.5],  # edges at pixel centres: the first belongs to it, the last does not
        [-8.3, -4.1, 12.6, 50.0],  # across three borders
        [20.1, 8.2, 20.9, 9.1],  # smaller than a pixel
        [14.6, 9.6, 15.4, 30.0],  # no pixel centre inside
        [60.0, 5.0, 70.0, 10.0],  # outside
        [-100.0, -100.0, 200.0, 150.0],  # around the image
    ]
)
IMAGE_SIZE = (33, 41)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize("some", [False, True], ids=["everywhere", "where"])
@pytest.mark.parametrize("compared", [False, True], ids=["written", "compared"])
def test_paste(seed: int, threshold: float, some: bool, compared: bool):
    torch.manual_seed(seed)
    probs = torch.rand(len(BOXES), 12, 12)
    masks = torch.rand(len(BOXES), *IMAGE_SIZE) < 0.5
    where = torch.rand(len(BOXES), 12, 12) < 0.4 if some else None
    before = torch.rand(len(BOXES), 12, 12) if compared else None
    expected = masks.numpy().copy()
    paste(probs, BOXES, masks, threshold, where, before)
    for index, box in enumerate(BOXES.double().numpy()):
        chosen = None if where is None else where[index].numpy()
        was = None if before is None else before[index].double().numpy()
        reference.paste(probs[index].double().numpy(), box, expected[index], threshold, chosen, was)
    assert (masks.numpy() == expected).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("side", [5, 14])
def test_masks_averaged_over_roi_cells(seed: int, side: int):
    torch.manual_seed(seed)
    masks = torch.rand(len(BOXES), *IMAGE_SIZE) < 0.4
    cropped = crop_masks(masks, BOXES, side)
    expected = [reference.area_average(*pair, side) for pair in zip(masks.numpy(), BOXES.double().numpy(), strict=True)]
    torch.testing.assert_close(cropped, torch.from_numpy(np.stack(expected)).float(), rtol=1e-4, atol=1e-4)


# Windows of an image


def area_average(image: Tensor, window: Tensor, side: int) -> Tensor:
    """Exact average of square pixels, grey beyond the image, over each output pixel; slow."""
    height, width = image.shape[1:]
    x0, y0, x1, y1 = window.tolist()

    def overlaps(start: float, step: float, length: int) -> Tensor:
        """``(side, length)``, the share of each output pixel that each image pixel covers."""
        shares = torch.zeros(side, length)
        for i in range(side):
            low, high = start + i * step, start + (i + 1) * step
            for j in range(length):
                shares[i, j] = max(0.0, min(high, j + 1) - max(low, j)) / step
        return shares

    rows, columns = overlaps(y0, (y1 - y0) / side, height), overlaps(x0, (x1 - x0) / side, width)
    return torch.einsum("ih,jw,chw->cij", rows, columns, image - OUTSIDE) + OUTSIDE


def natural_image() -> Tensor:
    """Texture at every scale and a hard edge, ``(3, 150, 201)``."""
    generator, image = torch.Generator().manual_seed(0), torch.zeros(1, 3, 150, 201)
    for octave in range(6):
        noise = torch.rand((1, 3, 150 >> octave, 201 >> octave), generator=generator)
        image += F.interpolate(noise, (150, 201), mode="bilinear") / 6
    image[:, :, 60:, 80:140] = 1 - image[:, :, 60:, 80:140]
    return image[0]


@pytest.mark.parametrize(("shrink", "mean"), [(0.3, 0.0076), (1, 0.0083), (3, 0.0076), (7, 0.0056)])
def test_windows_are_averaged_when_they_shrink(shrink: float, mean: float):
    """Measured: these mean errors from exact averages, in an image with a standard deviation of 0.092."""
    image, side = natural_image(), 20
    length = side * shrink
    windows = torch.tensor([[40.3, 33.8, 40.3 + length, 33.8 + length], [-7.0, 60.0, length - 7.0, 60.0 + length]])
    error = crop_image(image, windows, side) - torch.stack([area_average(image, window, side) for window in windows])
    assert error.abs().mean() < 1.2 * mean
    assert error.mean().abs() < 0.002


@pytest.mark.parametrize("shrink", [0.3, 1, 1.9, 2, 3, 7, 11])
def test_windows_lie_where_they_should(shrink: float):
    """A ramp is its own average at every scale, so each pixel tells where it was read."""
    x, y = (torch.arange(n) + 0.5 for n in (401, 350))
    ramp = torch.stack([x.expand(350, 401) / 400, y[:, None].expand(350, 401) / 400, torch.zeros(350, 401)])
    length = 16 * shrink
    x0, y0 = 50.25, 61.5
    crop = crop_image(ramp, torch.tensor([[x0, y0, x0 + length, y0 + length]]), 16)[0]
    steps = (torch.arange(16) + 0.5) * shrink
    torch.testing.assert_close(crop[0], ((x0 + steps) / 400).expand(16, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(crop[1], ((y0 + steps) / 400)[:, None].expand(16, 16), rtol=0, atol=1e-5)


def test_windows_of_different_scales_do_not_disturb_each_other():
    image, side = natural_image(), 12
    windows = torch.tensor([[0.0, 0, 120, 120], [5, 5, 9, 9], [-40, -40, 300, 300], [10, 20, 40, 50]])
    before = image.clone(), windows.clone()
    together = crop_image(image, windows, side)
    for index in range(4):
        assert together[index].equal(crop_image(image, windows[index : index + 1], side)[0])
    halves = ImageHalves(image)
    for part in (windows[:2], windows):  # cutting from what was halved before
        assert crop_image(halves, part, side).equal(together[: len(part)])
    assert image.equal(before[0]) and windows.equal(before[1])


def test_windows_beyond_the_image_are_grey():
    image = torch.ones(3, 40, 50)
    windows = torch.tensor([[-100.0, -100, -60, -60], [30, 20, 70, 60], [0, 0, 40, 40]])
    outside, corner, inside = crop_image(image, windows, 20)
    torch.testing.assert_close(outside, torch.full_like(outside, OUTSIDE))
    torch.testing.assert_close(corner[:, 11:, 11:], torch.full_like(corner[:, 11:, 11:], OUTSIDE))
    torch.testing.assert_close(inside, torch.ones_like(inside))
    assert crop_image(image, windows[:0], 20).shape == (0, 3, 20, 20)
