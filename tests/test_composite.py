"""Composites: labels follow what is pasted, and pixels follow the labels."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_crops import rectangle, write_dataset

from transfiner_refine.data.augment import warp_crop
from transfiner_refine.data.composite import Composer, CompositeShares, CutOut, draw_scene, load_stamps, tight_box
from transfiner_refine.data.crops import CropDataset
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.training.coarse import CoarseErrors, simulate_coarse

SIZE = (160, 200)
NEVER = CompositeShares(stamp=0, background=0, neighbour=0, poles=0)


def coloured(mask: np.ndarray, inside: int, outside: int) -> CutOut:
    image = np.where(mask[..., None], inside, outside).astype(np.uint8).repeat(3, axis=2)
    return CutOut(image, mask.astype(np.uint8) * 255)


OBJECTS = [
    coloured(rectangle(SIZE, (60, 40, 140, 120)), 230, 30),
    coloured(rectangle(SIZE, (80, 60, 120, 100)), 120, 60),
]


def composer(shares: CompositeShares, stamps: list[CutOut] | None = None) -> Composer:
    return Composer(1, lambda index: OBJECTS[1], stamps or [], shares)


@pytest.fixture(autouse=True)
def plain_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours as given and sharp rims, so that each pixel tells what it shows."""
    monkeypatch.setattr("transfiner_refine.data.composite.photometric", lambda image, rng: image)
    monkeypatch.setattr("transfiner_refine.data.composite._feather", lambda alpha, rng: alpha)


def test_neighbours_that_are_alike_are_of_one_kind_and_stand_beside_the_object():
    others = [coloured(rectangle(SIZE, (80, 60, 120, 100)), value, 60) for value in (120, 140, 160)]
    shares = replace(NEVER, neighbour=1, alike=1, in_front=0, hidden=1)
    tight = tight_box(OBJECTS[0].alpha)
    found = Composer(3, lambda index: others[index], [], shares, kinds=[0, 1, 1])
    seen, sides = set(), set()
    for seed in range(40):
        scene = found.scene(OBJECTS[0], np.random.default_rng(seed), kind=1)
        assert scene is not None
        for layer in scene.layers:
            seen.add(int(layer.cut.image.max()))
            height = layer.cut.alpha.shape[0] * layer.affine[1, 1]
            assert 0.8 < height / (tight[3] - tight[1]) < 1.25
            foot = layer.affine @ [layer.cut.alpha.shape[1] / 2, layer.cut.alpha.shape[0], 1]
            assert abs(foot[1] - tight[3]) < 0.1 * (tight[3] - tight[1])
            sides.add(bool(foot[0] > tight[[0, 2]].mean()))
        # The object in front stays whole.
        assert np.array_equal(scene.coverage, OBJECTS[0].alpha)
    assert seen == {140, 160} and sides == {False, True}


def test_without_shares_nothing_is_composed():
    assert all(composer(NEVER).scene(OBJECTS[0], np.random.default_rng(seed)) is None for seed in range(20))


@pytest.mark.parametrize("in_front", [0.0, 1.0])
def test_neighbours_hide_the_object_or_are_hidden_by_it(in_front: float):
    shares = CompositeShares(stamp=0, background=0, neighbour=1, poles=0, in_front=in_front)
    met = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scene = composer(shares).scene(OBJECTS[0], rng)
        if scene is None:  # both would have hidden too much
            continue
        drawn = warp_crop(draw_scene(scene, np.eye(2, 3), 256, rng), np.eye(2, 3), SIZE)[..., 0]
        seen = scene.coverage >= 255
        pasted = scene.neighbour >= 255
        assert (drawn[seen] == 230).all()
        # The rim of one pasted object may lie on the other.
        assert not pasted.any() or (drawn[pasted] == 120).mean() > 0.9
        rest = (scene.coverage == 0) & (scene.neighbour == 0)
        assert (drawn[rest] == 30).all()
        hidden = (scene.alpha >= 255) & (scene.coverage == 0)
        assert hidden.any() == bool((scene.alpha != scene.coverage).any() and in_front) or in_front == 1.0
        if in_front == 0.0:
            assert np.array_equal(scene.alpha, scene.coverage)
        assert hidden.sum() <= 2 * shares.hidden * (scene.alpha >= 255).sum()
        met += int(pasted.any())
    assert met > 15


def test_nothing_is_pasted_where_the_object_fills_its_cut_out():
    shares = CompositeShares(stamp=0, background=0, neighbour=1, poles=0)
    full = coloured(np.ones(SIZE, bool), 230, 30)
    assert all(composer(shares).scene(full, np.random.default_rng(seed)) is None for seed in range(5))


def test_another_background_leaves_the_object():
    shares = CompositeShares(stamp=0, background=1, neighbour=0, poles=0)
    rng = np.random.default_rng(0)
    scene = composer(shares).scene(OBJECTS[0], rng)
    assert scene is not None and scene.is_own and not scene.layers
    drawn = draw_scene(scene, np.eye(2, 3), 256, rng)[: SIZE[0], : SIZE[1], 0]
    assert (drawn[scene.alpha == 255] == 230).all()
    assert not (drawn[scene.alpha == 0] == 30).any()  # all of the old background is gone


def test_poles_are_thin_and_in_front():
    shares = CompositeShares(stamp=0, background=0, neighbour=0, poles=1)
    for seed in range(10):
        scene = composer(shares).scene(OBJECTS[0], np.random.default_rng(seed))
        assert scene is not None and all(layer.in_front for layer in scene.layers)
        lost = 1 - scene.coverage.sum() / scene.alpha.sum()
        assert 0 < lost < 0.4
        assert np.array_equal(scene.coverage.astype(int) + scene.neighbour >= 254, scene.alpha >= 254) or lost > 0


def test_stamps_stand_on_other_photos():
    stamp = coloured(np.ones((40, 60), bool), 200, 0)
    shares = CompositeShares(stamp=1, background=0, neighbour=0, poles=0)
    scene = composer(shares, [stamp]).scene(OBJECTS[0], np.random.default_rng(1))
    assert scene is not None and not scene.is_own and scene.background is not None
    x0, y0, x1, y1 = tight_box(scene.alpha)
    assert (x1 - x0, y1 - y0) == (60, 40)
    assert x0 >= 40 and y0 >= 40  # room for context


def test_only_photographic_stamps_are_read(tmp_path: Path):
    rng = np.random.default_rng(0)
    alpha = np.zeros((80, 700), np.uint8)
    alpha[10:70, 100:650] = 255
    photo = np.dstack([rng.integers(0, 255, (80, 700, 3), dtype=np.uint8), alpha])
    drawing = np.dstack([np.full((80, 700, 3), 90, np.uint8), alpha])
    for name, pixels in (("animals/photo.png", photo), ("animals/drawing.png", drawing), ("symbols/a.png", photo)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), pixels)
    cv2.imwrite(str(tmp_path / "opaque.png"), photo[..., :3])
    (only,) = load_stamps(tmp_path)
    assert only.image.shape == (35, 320, 3) and only.alpha.shape == (35, 320) and only.alpha.min() == 255
    with pytest.raises(InvalidInputError, match="photographic PNG"):
        load_stamps(tmp_path / "symbols")


def test_composites_of_a_dataset_depend_on_seed_epoch_and_index_alone(tmp_path: Path):
    boxes = [(60, 40, 140, 120), (20, 30, 120, 140), (80, 20, 180, 90)]
    source = write_dataset(tmp_path / "set", [{"mask": rectangle(SIZE, box)} for box in boxes])
    shares = CompositeShares(neighbour=0.8, background=0.5)

    def dataset(**changes) -> CropDataset:
        return CropDataset([source], tmp_path / "cache", **{"shares": shares, **changes})

    first, second, plain = dataset(), dataset(), dataset(shares=None)
    for index in range(3):
        a, b = first[index], second[index]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert any(not torch.equal(first[i].image, plain[i].image) for i in range(3))
    assert all(
        torch.equal(dataset(augment=False)[i].image, dataset(augment=False, shares=None)[i].image) for i in (0, 1)
    )


def test_a_head_takes_part_of_a_neighbour_for_the_object(rng: np.random.Generator):
    mask, neighbour = rectangle(SIZE, (40, 40, 100, 120)), rectangle(SIZE, (100, 40, 160, 120))
    nothing = CoarseErrors(untouched=0.0, one_pixel=0.0, displacement=0.0, offset=0.0, thinning=0.0, missing=0.0)
    errors = replace(nothing, leaks=0.0, box_noise=0.3, box_slip=0.0, smoothing=(0.0, 0.0), box_head=0.0, merges=1.0)
    caught = [int((simulate_coarse(mask, rng, errors, neighbour).mask & neighbour).sum()) for _ in range(40)]
    alone = [int((simulate_coarse(mask, rng, errors).mask & neighbour).sum()) for _ in range(40)]
    assert np.mean(caught) > 100 > 10 * np.mean(alone)
