"""The border: every accepted form of image, boxes and masks gives the same tensors; the rest is one clear error."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle
from transfiner_refine.inputs import as_boxes, as_image, as_masks, boxes_from_masks

H, W = 12, 17


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def masks(rng: np.random.Generator) -> np.ndarray:
    return rng.random((5, H, W)) < 0.3


class TestImage:
    def test_every_form_gives_the_same_pixels(self, pixels, tmp_path):
        path = tmp_path / "image.png"
        Image.fromarray(pixels).save(path)
        expected = torch.from_numpy(pixels).permute(2, 0, 1)
        forms = [path, str(path), Image.fromarray(pixels), pixels, expected, np.asfortranarray(pixels)]
        for form in forms:
            image = as_image(form)
            assert image.dtype == torch.uint8 and torch.equal(image, expected)

    def test_read_only_and_channel_reversed_arrays(self, pixels):
        expected = torch.from_numpy(pixels).permute(2, 0, 1)
        bgr = pixels[..., ::-1].copy()
        assert torch.equal(as_image(bgr[..., ::-1]), expected)
        read_only = pixels.copy()
        read_only.flags.writeable = False
        image = as_image(read_only)
        # Torch cannot protect read-only memory from writing, so this is the one case that is copied.
        assert torch.equal(image, expected) and not np.shares_memory(image.numpy(), read_only)

    def test_float_tensor_stays_float(self):
        image = torch.rand(3, H, W, dtype=torch.float64)
        taken = as_image(image)
        assert taken.dtype == torch.float32 and torch.equal(taken, image.float())

    def test_rounding_beyond_one_is_clamped_and_the_input_kept(self):
        image = torch.ones(3, H, W) + 1e-6
        assert float(as_image(image).max()) == 1 and float(image.max()) > 1

    def test_grey_is_repeated(self, pixels):
        grey = pixels[..., 0]
        for form in (
            grey,
            grey[..., None],
            torch.from_numpy(grey),
            torch.from_numpy(grey)[None],
            Image.fromarray(grey),
        ):
            image = as_image(form)
            assert image.shape == (3, H, W) and all(np.array_equal(channel, grey) for channel in image)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
    def test_any_8_bit_mode_of_pillow(self, mode):
        assert as_image(Image.new(mode, (W, H))).shape == (3, H, W)

    def test_alpha_is_dropped_and_colours_kept(self, pixels, tmp_path):
        rgba = Image.fromarray(pixels).convert("RGBA")
        rgba.putalpha(0)
        rgba.save(tmp_path / "clear.png")
        assert np.array_equal(as_image(tmp_path / "clear.png").permute(1, 2, 0), pixels)
        palette = Image.fromarray(pixels).quantize(16)
        palette.info["transparency"] = bytes(range(16))
        assert torch.equal(as_image(palette), as_image(Image.fromarray(pixels).quantize(16)))

    def test_orientation_is_not_applied(self, pixels, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
        assert as_image(tmp_path / "turned.png").shape == (3, H, W)

    @pytest.mark.parametrize(
        "image, message",
        [
            (None, "got NoneType"),
            ([[0, 1], [2, 3]], "got list"),
            ("no/such/photo.jpg", "does not exist"),
            (np.zeros((H, W, 3)), "uint8, got float64"),
            (np.zeros((H, W, 3), np.uint16), "uint8, got uint16"),
            (np.zeros((H, W, 4), np.uint8), "drop alpha"),
            (np.zeros((3, H, W), np.uint8), "channels last"),
            (np.zeros((1, H, W, 3), np.uint8), r"\(H, W, 3\)"),
            (np.zeros((0, W, 3), np.uint8), "at least one pixel"),
            (np.zeros((H, 0), np.uint8), "at least one pixel"),
            (Image.new("RGB", (0, H)), "at least one pixel"),
            (Image.new("I;16", (W, H)), "8 bits a channel"),
            (Image.new("F", (W, H)), "8 bits a channel"),
            (torch.zeros(4, H, W), "drop alpha"),
            (torch.zeros(H, W, 3), "channels first"),
            (torch.zeros(2, 3, H, W), "refine_batch"),
            (torch.zeros(3, 0, W), "at least one pixel"),
            (torch.zeros(3, H, W, dtype=torch.int64), "got torch.int64"),
            (torch.full((3, H, W), 255.0), "divide by 255"),
            (torch.full((3, H, W), -1.0), "from -1 to -1"),
            (torch.full((3, H, W), float("nan")), "nan"),
        ],
    )
    def test_what_is_no_image_is_refused(self, image, message):
        with pytest.raises(InvalidInputError, match=message):
            as_image(image)

    def test_files_that_cannot_be_read(self, pixels, tmp_path):
        text, cut = tmp_path / "text.png", tmp_path / "cut.jpg"
        text.write_text("no picture")
        Image.fromarray(pixels).resize((200, 200)).save(cut)
        cut.write_bytes(cut.read_bytes()[:-500])
        for path in (text, cut, tmp_path):
            with pytest.raises(InvalidInputError, match=f"Pillow can read, got {path}"):
                as_image(path)


class TestBoxes:
    def test_every_form_gives_the_same_boxes(self):
        rows = [[0, 1, 5, 6], [-4, -3, 40, 50]]
        forms = [rows, np.array(rows), np.array(rows, np.float64)[::-1][::-1], torch.tensor(rows).half()]
        for form in forms:
            boxes = as_boxes(form, (H, W))
            assert boxes.dtype == torch.float32 and boxes.tolist() == rows

    @pytest.mark.parametrize("empty", [[], np.zeros((0, 4)), torch.zeros(0, 4)])
    def test_no_boxes(self, empty):
        boxes = as_boxes(empty, (H, W))
        assert boxes.shape == (0, 4) and boxes.dtype == torch.float32

    def test_a_box_outside_the_image_is_no_error(self):
        assert as_boxes([[100, 100, 120, 130], [-9, -9, -2, -1]], (H, W)).shape == (2, 4)

    @pytest.mark.parametrize(
        "boxes, message",
        [
            (None, "expected boxes as a tensor"),
            ("boxes", "expected boxes as a tensor"),
            ([[0, 0, 1], [0, 1]], "expected boxes as a tensor"),
            (3.0, "single value"),
            ([0, 0, 5, 5], r"shape \(N, 4\), got \(4,\)"),
            (np.zeros((2, 5)), r"shape \(N, 4\), got \(2, 5\)"),
            (np.zeros((1, 2, 4)), r"shape \(N, 4\), got \(1, 2, 4\)"),
            (np.zeros((0, 5)), r"shape \(N, 4\), got \(0, 5\)"),
            (np.ones((2, 4), bool), "got torch.bool"),
            ([[0, 0, 5, 5], [0, np.nan, 5, 5], [0, 0, np.inf, 5]], r"NaN or infinity at index \[1, 2\]"),
            ([[0, 0, 5, 5], [0, 0, 1e300, 5]], r"NaN or infinity at index \[1\]"),
            ([[0, 0, 5, 5], [5, 0, 0, 5], [0, 5, 5, 0]], r"at index \[1, 2\], the first \[5.0, 0.0, 0.0, 5.0\]"),
            ([[0, 0, 5, 5], [3, 3, 3, 8]], r"without area at index \[1\]"),
            ([[0.1, 0.2, 0.5, 0.9]], r"multiply relative boxes by \(17, 12, 17, 12\)"),
        ],
    )
    def test_unusable_boxes_are_refused(self, boxes, message):
        with pytest.raises(InvalidInputError, match=message):
            as_boxes(boxes, (H, W))

    def test_the_pixel_in_the_corner_is_no_relative_box(self):
        assert len(as_boxes([[0, 0, 1, 1]], (H, W))) == 1
        assert len(as_boxes([[0.1, 0.1, 0.5, 0.5], [3, 3, 8, 8]], (H, W))) == 2


class TestMasks:
    def forms(self, masks: np.ndarray) -> list[Any]:
        return [
            masks,
            torch.from_numpy(masks),
            masks.astype(np.uint8),
            masks.astype(np.uint8) * 255,
            masks.astype(np.int64),
            list(masks),
            [torch.from_numpy(mask) for mask in masks],
            [Image.fromarray(mask) for mask in masks],
            rle.encode(masks),
            tuple({**one, "counts": one["counts"].encode()} for one in rle.encode(masks)),
        ]

    def test_every_form_gives_the_same_masks(self, masks):
        for form in self.forms(masks):
            taken = as_masks(form, (H, W))
            assert taken.frame == "image" and taken.data.dtype == torch.bool
            assert np.array_equal(taken.data, masks)

    def test_polygons(self):
        square = [[2.0, 3.0, 9.0, 3.0, 9.0, 8.0, 2.0, 8.0]]
        taken = as_masks([square, square], (H, W)).data
        assert taken[:, 3:8, 2:9].all() and int(taken.sum()) == 2 * 35

    def test_probabilities_stay_float32(self, rng):
        probs = rng.random((5, H, W))
        taken = as_masks(probs, (H, W)).data
        assert taken.dtype == torch.float32 and torch.equal(taken, torch.from_numpy(probs).float())
        assert as_masks(torch.rand(2, H, W).bfloat16(), (H, W)).data.dtype == torch.float32

    def test_rounding_beyond_one_is_clamped(self):
        assert float(as_masks(torch.full((1, H, W), 1 + 1e-6), (H, W)).data.max()) == 1

    def test_the_box_frame_is_float(self, rng):
        probs = rng.random((5, 28, 28), dtype=np.float32)
        taken = as_masks(probs, (H, W), "box")
        assert taken.frame == "box" and np.array_equal(taken.data, probs)
        hard = as_masks(probs > 0.5, (H, W), "box").data
        assert hard.dtype == torch.float32 and np.array_equal(hard, (probs > 0.5).astype(np.float32))

    @pytest.mark.parametrize("empty", [[], np.zeros((0, H, W)), torch.zeros(0, H, W), np.zeros((0, 1, 1), bool)])
    def test_no_masks(self, empty):
        taken = as_masks(empty, (H, W))
        assert taken.data.shape == (0, H, W) and taken.data.dtype == torch.bool
        assert as_masks(empty, (H, W), "box").data.shape == (0, 28, 28)

    def test_inputs_are_not_written(self, masks):
        for form in (masks, masks.astype(np.uint8) * 255, masks.astype(np.float64)):
            before = form.copy()
            as_masks(form, (H, W))
            assert np.array_equal(form, before) and form.dtype == before.dtype

    @pytest.mark.parametrize(
        "given, message",
        [
            (None, "expected masks as a tensor"),
            (np.zeros((H, W), bool), r"mask\[None\]"),
            (np.zeros((2, 1, H, W), bool), r"masks\[:, 0\]"),
            (np.zeros((2, W, H), bool), "height, width"),
            (np.zeros((2, 28, 28)), 'mask_frame="box"'),
            (np.zeros((2, 28, 27)), r"expected masks of shape \(N, 12, 17\) as the image, got \(2, 28, 27\)"),
            ([np.zeros((H, W)), np.zeros((H, W + 1))], "expected masks as a tensor"),
            (np.full((2, H, W), 1.5), "sigmoid"),
            (np.full((2, H, W), -0.5), "sigmoid"),
            (np.full((2, H, W), np.nan), "nan"),
            (np.arange(2 * H * W).reshape(2, H, W) % 256, "divide probabilities"),
            (np.arange(2 * H * W).reshape(2, H, W) % 3 - 1, "from -1 to 1"),
            (np.full((2, H, W), -1, np.int8), "from -1 to -1"),
            (np.zeros((2, H, W), np.uint16), "got torch.uint16"),
            (np.zeros((2, H, W), complex), "not a number"),
            ({"size": [H, W], "counts": "\\6"}, "put it into a list"),
            ([{"size": [W, H], "counts": "\\6"}], "segmentation 0: .* another image"),
            ([{"size": [H, W], "counts": "\\6"}, {"size": [H, W], "counts": "\\"}], "segmentation 1: .* cut short"),
            ([[[1, 2, 3, 4]]], "segmentation 0: .* at least 3 points"),
        ],
    )
    def test_unusable_masks_are_refused(self, given, message):
        with pytest.raises(InvalidInputError, match=message):
            as_masks(given, (H, W))

    @pytest.mark.parametrize(
        "given, frame, message",
        [
            (np.zeros((2, 28, 27)), "box", r"shape \(N, S, S\)"),
            (np.zeros((2, 0, 0)), "box", r"shape \(N, S, S\)"),
            (np.zeros((28, 28)), "box", r"shape \(N, S, S\)"),
            ([{"size": [H, W], "counts": "\\6"}], "box", "COCO segmentations"),
            (np.zeros((2, H, W)), "roi", 'expected mask_frame "image" or "box"'),
        ],
    )
    def test_a_frame_that_does_not_fit_is_refused(self, given, frame, message):
        with pytest.raises(InvalidInputError, match=message):
            as_masks(given, (H, W), frame)

    def test_an_image_size_without_pixels_is_refused(self):
        with pytest.raises(InvalidInputError, match="image_size"):
            as_masks(np.zeros((1, 0, W), bool), (0, W))

    @pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
    def test_plain_arrays_are_not_copied(self, dtype):
        array = np.zeros((2, H, W), dtype)
        assert np.shares_memory(np.asarray(as_masks(array, (H, W)).data), array)

    def test_run_lengths_are_decoded_into_one_array(self):
        size, n = (400, 500), 40
        segmentations = rle.encode(np.ones((n, *size), bool))
        tracemalloc.start()
        as_masks(segmentations, size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * n * size[0] * size[1]


class TestBoxesFromMasks:
    def test_agrees_with_the_pixels_of_each_mask(self, masks):
        masks[1] = False
        masks[2] = False
        masks[2, 4, 7] = True
        masks[3] = True
        boxes = boxes_from_masks(torch.from_numpy(masks))
        assert boxes.dtype == torch.float32
        for mask, box in zip(masks, boxes.tolist(), strict=True):
            rows, cols = np.nonzero(mask)
            tight = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
            assert box == tight

    def test_probabilities_count_from_one_half(self):
        probs = torch.zeros(1, H, W)
        probs[0, 3:5, 6:9] = 0.5
        probs[0, 0, 0] = 0.49
        assert boxes_from_masks(probs).tolist() == [[6, 3, 9, 5]]

    def test_no_masks(self):
        assert boxes_from_masks(torch.zeros(0, H, W, dtype=torch.bool)).shape == (0, 4)


def test_real_detections_decode_to_their_boxes(data_root: Path):
    """A detector's own RLE and boxes agree: the mask's tight box lies within the detector's, give or take a pixel."""
    results = json.loads((data_root / "demo" / "detections.json").read_text())
    for result in results:
        size = tuple(result["segmentation"]["size"])
        x1, y1, x2, y2 = boxes_from_masks(as_masks([result["segmentation"]], size).data)[0].tolist()
        x, y, w, h = result["bbox"]
        assert x1 >= x - 2 and y1 >= y - 2 and x2 <= x + w + 2 and y2 <= y + h + 2
