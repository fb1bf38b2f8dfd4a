"""COCO segmentations: decoding agrees with pycocotools, encoding is its inverse, and broken ones are refused."""

import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.rle import compress, decode, decode_batch, encode

SIZE = (37, 53)

# Decoding with pycocotools, here the reference, warns on numpy 2; the package does not decode with it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def masks(rng: np.random.Generator) -> np.ndarray:
    """Noise, a block, nothing, everything, the first pixel, the last pixel."""
    masks = np.zeros((6, *SIZE), bool)
    masks[0] = rng.random(SIZE) < 0.4
    masks[1, 5:30, 10:50] = True
    masks[3] = True
    masks[4, 0, 0] = True
    masks[5, -1, -1] = True
    return masks


def by_pycocotools(mask: np.ndarray) -> Any:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def plain_counts(mask: np.ndarray) -> list[int]:
    """Run lengths by walking down the columns, one pixel after the other."""
    counts, value = [0], False
    for pixel in mask.T.flatten():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def test_decode_is_the_inverse_of_encode(masks):
    assert (decode_batch(encode(masks), SIZE) == masks).all()


def test_encode_agrees_with_pycocotools_and_is_ready_for_json(masks):
    encoded = encode(masks)
    assert json.loads(json.dumps(encoded)) == encoded
    for rle, mask in zip(encoded, masks, strict=True):
        assert rle == {"size": list(SIZE), "counts": by_pycocotools(mask)["counts"].decode()}


def test_compress_brings_every_form_to_that_of_encode(masks):
    polygon = [[10, 5, 50, 5, 50, 30, 10, 30]]
    assert compress(polygon, SIZE) == encode(masks[1:2])[0]
    for mask, code in zip(masks, encode(masks), strict=True):
        plain = {"size": list(SIZE), "counts": plain_counts(mask)}
        for form in (code, by_pycocotools(mask), plain):
            assert compress(form, SIZE) == code
    with pytest.raises(InvalidInputError, match="belongs to another image"):
        compress(encode(masks)[0], (SIZE[1], SIZE[0]))
    with pytest.raises(InvalidInputError, match="damaged or cut short"):
        compress({"size": list(SIZE), "counts": "zz~"}, SIZE)


def test_decode_takes_what_pycocotools_wrote_as_bytes_or_text(masks):
    for mask in masks:
        rle = by_pycocotools(mask)
        assert (decode(rle, SIZE) == mask).all()
        assert (decode({**rle, "counts": rle["counts"].decode()}, SIZE) == mask).all()


def test_decode_takes_plain_counts(masks):
    for mask in masks:
        assert (decode({"size": list(SIZE), "counts": plain_counts(mask)}, SIZE) == mask).all()


def test_decode_agrees_with_pycocotools_on_long_runs():
    # Runs beyond 2^15 and differences of either sign need counts of four characters.
    mask = np.zeros((900, 1300), bool)
    mask[:, 200:700] = True
    mask[450, 900] = True
    mask[3:890, 1200] = True
    rle = by_pycocotools(mask)
    assert (decode(rle, (900, 1300)) == coco_mask.decode(rle)).all()


def test_polygons_are_rasterised_as_in_coco_and_united():
    left, right = [2.0, 2.0, 20.0, 2.0, 20.0, 30.0, 2.0, 30.0], [15, 10, 40.5, 10, 40.5, 20.5]
    united = decode([left, right], SIZE)
    polygons: Any = [left, right]  # the type stubs of pycocotools know no polygons
    parts = [coco_mask.decode(rle) for rle in coco_mask.frPyObjects(polygons, *SIZE)]
    assert (united == (parts[0] | parts[1])).all()
    assert (united == decode([left], SIZE) | decode([right], SIZE)).all()
    assert united[2:30, 2:20].all() and not united[31:].any()


def test_a_batch_mixes_run_lengths_and_polygons(masks):
    triangle = [[0, 0, 30, 0, 0, 30]]
    mixed = decode_batch([encode(masks)[0], triangle, {"size": SIZE, "counts": plain_counts(masks[1])}], SIZE)
    assert (mixed == np.stack([masks[0], decode(triangle, SIZE), masks[1]])).all()


def test_no_masks():
    assert encode(np.zeros((0, *SIZE), bool)) == []
    assert decode_batch([], SIZE).shape == (0, *SIZE)


def test_encode_takes_any_memory_order_and_leaves_its_input(masks):
    view = masks[::-1, :, ::-1]
    before = view.copy()
    assert encode(view) == encode(before)
    assert (view == before).all()


@pytest.mark.parametrize("shape, dtype", [((4, 5), bool), ((1, 4, 5), np.uint8), ((1, 0, 5), bool)])
def test_encode_refuses_what_is_not_a_stack_of_masks(shape, dtype):
    with pytest.raises(InvalidInputError, match="expected masks of shape"):
        encode(np.zeros(shape, dtype))


BROKEN: dict[str, tuple[Any, str]] = {
    "other size": ({"size": [53, 37], "counts": "n0"}, "another image"),
    "size of strings": ({"size": ["37", "53"], "counts": "n0"}, "another image"),
    "no size": ({"counts": "n0"}, '"size" and "counts"'),
    "no counts": ({"size": [37, 53]}, '"size" and "counts"'),
    "counts None": ({"size": [37, 53], "counts": None}, "string or a list of integers"),
    "counts of floats": ({"size": [37, 53], "counts": [0.0, 1961.0]}, "string or a list of integers"),
    "nested counts": ({"size": [37, 53], "counts": [[0, 1961]]}, "string or a list of integers"),
    "ragged counts": ({"size": [37, 53], "counts": [[1], [2, 3]]}, "string or a list of integers"),
    "lone surrogate": ({"size": [37, 53], "counts": "\ud800abc"}, "damaged or cut short"),
    "empty counts": ({"size": [37, 53], "counts": ""}, "damaged or cut short"),
    "no runs": ({"size": [37, 53], "counts": []}, "1961 pixels"),
    "cut short": ({"size": [37, 53], "counts": "P"}, "damaged or cut short"),
    "foreign characters": ({"size": [37, 53], "counts": "n0 \n"}, "damaged or cut short"),
    "beyond the alphabet": ({"size": [37, 53], "counts": b"\x99m1"}, "damaged or cut short"),  # b"Ym1" is 1961
    "not ASCII": ({"size": [37, 53], "counts": "ß€"}, "damaged or cut short"),
    "endless number": ({"size": [37, 53], "counts": "o" * 40 + "0"}, "damaged or cut short"),
    "sum too small": ({"size": [37, 53], "counts": [1000, 960]}, "1961 pixels"),
    "sum too large": ({"size": [37, 53], "counts": [1000, 962]}, "1961 pixels"),
    "negative run": ({"size": [37, 53], "counts": [2000, -39]}, "1961 pixels"),
    "negative run, compressed": ({"size": [37, 53], "counts": "O"}, "1961 pixels"),
    "sum that wraps around": ({"size": [37, 53], "counts": [2**62, 2**62, 2**62, 2**62, 1961]}, "1961 pixels"),
    "text": ("n0", "a dict of run lengths or a list of polygons"),
    "number": (7, "a dict of run lengths or a list of polygons"),
    "no polygon": ([], "list of polygons"),
    "flat polygon": ([0, 0, 30, 0, 0, 30], "a list of its own"),
    "two points": ([[0, 0, 30, 30]], "at least 3 points"),
    "odd length": ([[0, 0, 30, 0, 0, 30, 1]], "at least 3 points"),
    "points as pairs": ([[[0, 0], [30, 0], [0, 30]]], "at least 3 points"),
    "ragged polygon": ([[0, [1, 2], 30, 0, 0, 30]], "at least 3 points"),
    "text in a polygon": ([[0, 0, 30, 0, 0, "30"]], "at least 3 points"),
    "NaN in a polygon": ([[0, 0, 30, 0, 0, float("nan")]], "finite"),
    "infinity in a polygon": ([[0, 0, 30, 0, 0, float("inf")]], "finite"),
    "absurd polygon": ([[0, 0, 1e12, 0, 0, 30]], "finite"),
    "endless outline": ([[-1e6, -1e6, 1e6, 1e6] * 20], "pixels long, got 80000000"),
    "endless outline of many polygons": ([[-1e6, -1e6, 1e6, 1e6, 0, 0]] * 2, "outline is at most"),
}


@pytest.mark.parametrize("segmentation, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_segmentation_is_one_clear_error(segmentation, message):
    with pytest.raises(InvalidInputError, match=message):
        decode(segmentation, SIZE)


def test_a_batch_names_the_broken_segmentation(masks):
    segmentations = [*encode(masks), {"size": list(SIZE), "counts": "x"}]
    with pytest.raises(InvalidInputError, match=r"^segmentation 6: expected .* got 'x'"):
        decode_batch(segmentations, SIZE)


def test_random_strings_never_crash(rng):
    for _ in range(300):
        counts = bytes(rng.integers(40, 120, size=rng.integers(0, 30)).tolist())
        with pytest.raises(InvalidInputError):
            decode({"size": list(SIZE), "counts": counts}, SIZE)


def test_every_truncation_and_changed_character_is_noticed_or_harmless(masks, rng):
    rle = encode(masks)[0]
    for _ in range(200):
        place = int(rng.integers(len(rle["counts"])))
        changed = rle["counts"][:place] + chr(int(rng.integers(48, 112))) + rle["counts"][place + 1 :]
        with pytest.raises(InvalidInputError):
            decode({**rle, "counts": rle["counts"][:place]}, SIZE)
        try:
            assert decode({**rle, "counts": changed}, SIZE).shape == SIZE
        except InvalidInputError:
            continue
