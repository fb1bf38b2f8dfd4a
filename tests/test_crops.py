"""Training crops: every map lies where inference would put it, to a fraction of a pixel, whatever the augmentation."""

import base64
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from transfiner_refine.data import augment, crops
from transfiner_refine.data.crops import CropDataset, CropSample, init_worker
from transfiner_refine.data.object_cache import CropSource
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.boxes import crop_windows, expand_boxes
from transfiner_refine.functional.crops import crop_image
from transfiner_refine.functional.paste import crop_box_masks, crop_masks
from transfiner_refine.functional.rle import encode
from transfiner_refine.pipeline import CROP_SIDE, CROP_SPAN

MARGIN = 0.125


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def write_dataset(root: Path, objects: list[dict]) -> CropSource:
    """Write a COCO-format dataset: one image per object, ``mask`` white on dark, and its ``found`` coarse masks."""
    (root / "images").mkdir(parents=True)
    images, annotations, detections = [], [], []
    for number, item in enumerate(objects, start=1):
        mask, name = item["mask"], f"{number}.png"
        image = item.get("image", np.where(mask[..., None], 230, 30).astype(np.uint8).repeat(3, axis=2))
        cv2.imwrite(str(root / "images" / name), image[..., ::-1])
        images.append({"id": number, "file_name": name, "height": mask.shape[0], "width": mask.shape[1]})
        entry = {"id": 10 * number, "image_id": number, "category_id": 1, "iscrowd": item.get("iscrowd", 0)}
        annotations.append({**entry, "area": int(mask.sum()), "segmentation": encode(mask[None])[0]})
        for found in item.get("found", []):
            x0, y0, x1, y1 = found["box"]
            soft = {"soft28": base64.b64encode(found["soft"].tobytes()).decode()} if "soft" in found else {}
            result = {"image_id": number, "category_id": 1, "score": 0.9, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            detections.append({**result, "segmentation": encode(found["mask"][None])[0], **soft})
    (root / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "detections.json").write_text(json.dumps(detections))
    return CropSource(root)


def edges(plane: np.ndarray) -> np.ndarray:
    """Sub-pixel xyxy of an upright rectangle of ones on zeros, from its mass and its centre of mass."""
    total = plane.sum()
    x, y = (np.arange(n) + 0.5 for n in plane.shape[::-1])
    centre = np.array([(plane.sum(0) * x).sum(), (plane.sum(1) * y).sum()]) / total
    size = np.array([plane.max(0).sum(), plane.max(1).sum()])
    return np.concatenate([centre - size / 2, centre + size / 2])


def edges_in_crop(sample: CropSample, plane: np.ndarray) -> np.ndarray:
    """Edges of a rectangle in a RoI-frame plane, in crop pixels."""
    x0, y0, x1, y1 = sample.roi.numpy()
    cell = np.array([x1 - x0, y1 - y0]) / plane.shape[0]
    return edges(plane) * np.tile(cell, 2) + np.tile([x0, y0], 2)


def whiteness(sample: CropSample) -> np.ndarray:
    """The drawn object in the crop, 0 to 1; the fill outside of the image counts as background."""
    return np.clip((sample.image[0].numpy().astype(float) - 127) / 103, 0, 1)


def test_what_is_broken_is_named(tmp_path: Path):
    mask, box = rectangle((90, 100), (31, 40, 62, 75)), (31, 40, 62, 75)
    source = write_dataset(tmp_path / "set", [{"mask": mask, "found": [{"mask": mask, "box": box}]}] * 2)
    for name, part, key in (("annotations.json", "annotations", "segmentation"), ("detections.json", None, "soft28")):
        path = tmp_path / "set" / name
        before = path.read_text()
        document = json.loads(before)
        (document[part] if part else document)[1][key] = "abc"
        path.write_text(json.dumps(document))
        place = "annotation 20 of 2.png: expected a COCO" if part else "entry 1: expected soft28"
        with pytest.raises(InvalidInputError, match=f"{path}, {place}"):
            CropDataset([source], tmp_path / "cache")
        path.write_text(before)


# (image size, object): unshrunk, enlarged, and large enough to be shrunk in the cache.
CASES = [((300, 400), (120, 90, 251, 180)), ((90, 100), (31, 40, 62, 75)), ((1400, 1200), (205, 300, 1003, 1000))]


@pytest.mark.parametrize(("size", "box"), CASES)
def test_known_rectangle_is_found_where_inference_puts_it(tmp_path: Path, size, box):
    mask = rectangle(size, box)
    source = write_dataset(tmp_path / "set", [{"mask": mask, "found": [{"mask": mask, "box": box}]}])
    dataset = CropDataset([source], tmp_path / "cache", augment=False, real_share=1.0, soft_share=0.0)
    sample = dataset[0]

    boxes = torch.tensor([box], dtype=torch.float32)
    rois = expand_boxes(boxes, MARGIN)
    window = crop_windows(rois, CROP_SPAN, CROP_SIDE)[0]
    scale = CROP_SIDE / float(window[2] - window[0])
    to_crop = [(b - window[:2].repeat(2)) * scale for b in (rois[0], boxes[0])]
    # The cache rounds the sides of a shrunk cut-out to whole pixels: up to a third of a pixel over the whole crop.
    assert torch.allclose(sample.roi, to_crop[0], atol=0.35)
    expected = sample.roi + (to_crop[1] - to_crop[0])
    image = sample.image[0].numpy().astype(float)
    inside = (image - 30) / 200 * (image != augment.FILL)
    x0, y0, x1, y1 = (int(v) for v in to_crop[0].round())
    near = np.zeros_like(inside)  # the RoI alone, so that interpolation at the image's border stays out
    near[max(y0, 0) : y1, max(x0, 0) : x1] = inside[max(y0, 0) : y1, max(x0, 0) : x1]
    assert np.abs(edges(near) - expected.numpy()).max() < 0.6
    centre = np.array([edges(near)[i::2].mean() for i in (0, 1)])
    assert np.abs(centre - [expected[i::2].mean() for i in (0, 1)]).max() < 0.1
    assert np.abs(edges_in_crop(sample, sample.coarse.numpy()) - expected.numpy()).max() < 0.6
    assert np.abs(edges_in_crop(sample, sample.target.numpy().astype(float)) - expected.numpy()).max() < 0.6

    coarse = crop_masks(torch.from_numpy(mask)[None], rois, 112)[0]
    assert (sample.coarse - coarse).abs().mean() < 0.01
    whole = torch.from_numpy(np.where(mask, 230, 30) / np.float32(255))[None].expand(3, -1, -1)
    crop = crop_image(whole, window[None], CROP_SIDE)[0]
    assert (sample.image / 255 - crop).abs().mean() < 0.01


def test_unshrunk_coarse_masks_are_exactly_those_of_inference(tmp_path: Path, rng: np.random.Generator):
    size, box = (120, 160), (50, 30, 110, 90)
    mask = rectangle(size, box)
    soft = rng.integers(0, 256, (28, 28), dtype=np.uint8)
    source = write_dataset(tmp_path / "set", [{"mask": mask, "found": [{"mask": mask, "box": box, "soft": soft}]}])
    boxes = torch.tensor([box], dtype=torch.float32)
    rois = expand_boxes(boxes, MARGIN)
    options = {"augment": False, "real_share": 1.0}
    binary = CropDataset([source], tmp_path / "cache", soft_share=0.0, **options)[0].coarse
    assert torch.allclose(binary, crop_masks(torch.from_numpy(mask)[None], rois, 112)[0], atol=1e-5)
    probs = CropDataset([source], tmp_path / "cache", soft_share=1.0, **options)[0].coarse
    expected = crop_box_masks(torch.from_numpy(soft / np.float32(255))[None], boxes, rois, 112)[0]
    assert torch.allclose(probs, expected, atol=1e-5)


@pytest.mark.parametrize("real_share", [0.0, 1.0])
def test_augmented_maps_stay_on_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_share: float):
    monkeypatch.setattr(crops, "photometric", lambda image, rng: image)
    monkeypatch.setattr(crops, "MAX_ROTATION", 0.6)  # far enough for an object turned about a wrong point to be lost
    mask = rectangle((600, 700), (290, 240, 381, 330))
    mask[270:300, 381:440] = True  # not symmetric: a missed flip shows
    box = (290, 240, 440, 330)
    source = write_dataset(tmp_path / "set", [{"mask": mask, "found": [{"mask": mask, "box": box}]}])
    dataset = CropDataset([source], tmp_path / "cache", real_share=real_share, soft_share=0.0)
    mirrored = 0
    for epoch in range(25):
        dataset.set_epoch(epoch)
        sample = dataset[0]
        x0, y0, x1, y1 = sample.roi.numpy()
        assert min(x0, y0) > -5 and max(x1, y1) < CROP_SIDE + 5
        assert 0.5 * 120 < max(x1 - x0, y1 - y0) < 240
        cell = np.array([x1 - x0, y1 - y0]) / 224
        to_crop = np.array([[cell[0], 0, x0], [0, cell[1], y0]])
        target = augment.warp(sample.target.numpy().astype(np.float32), to_crop, (CROP_SIDE, CROP_SIDE), 0) >= 0.5
        shown = whiteness(sample) >= 0.03
        shown_roi = augment.warp(np.ones((224, 224), np.uint8), to_crop, (CROP_SIDE, CROP_SIDE), 0) > 0
        shown &= shown_roi  # a cut-off box leaves parts of the object outside of the RoI
        assert (target & shown).sum() / (target | shown).sum() > 0.95
        if real_share:
            fine = torch.nn.functional.avg_pool2d(sample.target[None].float(), 2)[0]
            assert (sample.coarse - fine).abs().mean() < 0.01
        columns = np.flatnonzero(target.any(0))
        middle = (columns[0] + columns[-1]) / 2
        mirrored += bool((np.nonzero(target)[1] > middle).mean() > 0.5)
    assert 3 < mirrored < 22


def test_outside_of_the_image_is_grey_and_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mask = rectangle((200, 240), (0, 0, 150, 130))
    source = write_dataset(tmp_path / "set", [{"mask": mask}])
    plain = CropDataset([source], tmp_path / "cache", augment=False, real_share=0.0)[0]
    assert (plain.image[:, 0, 0] == augment.FILL).all()
    # The first two cells lie in the margin, wholly outside of the image.
    for coarse, target in ((plain.coarse, plain.target), (plain.coarse.T, plain.target.T)):
        assert coarse[:2].max() == 0 and not target[:4].any()

    # Whatever colours become, the outside stays the encoder's zero.
    monkeypatch.setattr(crops, "photometric", lambda image, rng: np.full_like(image, 250))
    dataset = CropDataset([source], tmp_path / "cache", real_share=0.0)
    values = set()
    for epoch in range(5):
        dataset.set_epoch(epoch)
        values |= set(dataset[0].image.unique().tolist())
    assert values == {augment.FILL, 250}


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path):
    mask = rectangle((120, 160), (50, 30, 110, 90))
    source = write_dataset(tmp_path / "set", [{"mask": mask}, {"mask": mask.copy()}])

    def same(a: CropSample, b: CropSample) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first, second = (CropDataset([source], tmp_path / "cache", seed=7) for _ in range(2))
    second[1]
    assert same(first[0], second[0])
    other = CropDataset([source], tmp_path / "cache", seed=8)
    assert not same(first[0], other[0]) and not torch.equal(first[0].image, first[1].image)
    before = first[0]
    first.set_epoch(1)
    assert not same(before, first[0])
    first.set_epoch(0)
    assert same(before, first[0])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_workers_see_the_epoch_and_make_the_same_samples(tmp_path: Path):
    mask = rectangle((120, 160), (50, 30, 110, 90))
    source = write_dataset(tmp_path / "set", [{"mask": mask}, {"mask": mask.copy()}])
    dataset = CropDataset([source], tmp_path / "cache")
    options = {"batch_size": 2, "num_workers": 1, "persistent_workers": True, "worker_init_fn": init_worker}
    loader = DataLoader(dataset, multiprocessing_context="fork", **options)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        (batch,) = list(loader)
        assert isinstance(batch, CropSample) and batch.image.dtype == torch.uint8
        assert torch.equal(batch.image, torch.stack([dataset[i].image for i in range(2)]))


def test_objects_are_chosen_as_asked(tmp_path: Path):
    big, small = rectangle((120, 160), (50, 30, 110, 90)), rectangle((120, 160), (50, 30, 60, 40))
    objects = [{"mask": big}, {"mask": small}, {"mask": big, "iscrowd": 1}, {"mask": big}]
    source = write_dataset(tmp_path / "set", objects)
    kept = CropSource(source.directory, weight=0.3, exclude=["4.png"])
    dataset = CropDataset([kept, CropSource(source.directory, min_area=1)], tmp_path / "cache")
    assert len(dataset) == 1 + 3
    assert [round(float(dataset[i].weight), 3) for i in (0, 1)] == [0.3, 1.0]
    assert [int(dataset[i].index) for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("box", [(1000, 1000, 1050, 1050), (-3000, 10, 100, 70), (50, 30, 55, 90)])
def test_a_wrong_box_is_replaced_by_that_of_the_mask(tmp_path: Path, box: tuple[int, int, int, int]):
    """And the soft map in it is left out: the sample is the same as without either."""
    mask, found = rectangle((120, 160), (50, 30, 110, 90)), rectangle((120, 160), (52, 30, 110, 90))
    soft = np.full((28, 28), 99, np.uint8)
    wrong = {"mask": found, "box": box, "soft": soft}
    right = {"mask": found, "box": (52, 30, 110, 90)}
    samples = []
    for name, detection in (("wrong", wrong), ("right", right)):
        source = write_dataset(tmp_path / name, [{"mask": mask, "found": [detection]}])
        dataset = CropDataset([source], tmp_path / "cache", augment=False, real_share=1.0, soft_share=1.0)
        samples.append(dataset[0])
    assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))
    assert samples[0].target.float().mean() > 0.5


def test_cache_is_reused_rebuilt_after_a_change_and_never_half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mask = rectangle((120, 160), (50, 30, 110, 90))
    root = tmp_path / "set"
    source = write_dataset(root, [{"mask": mask}, {"mask": mask}])
    cache = tmp_path / "cache"
    image = CropDataset([source], cache, augment=False)[0].image
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imread", None)
        assert torch.equal(CropDataset([source], cache, augment=False)[0].image, image)  # no image is read again
    cv2.imwrite(str(root / "images/1.png"), np.full((120, 160, 3), 99, np.uint8))
    assert (CropDataset([source], cache, augment=False)[0].image[:, 100:150, 100:150] == 99).all()

    (root / "images/1.png").rename(root / "images/gone.png")
    document = json.loads((root / "annotations.json").read_text())
    document["annotations"].pop()
    (root / "annotations.json").write_text(json.dumps(document))
    before = sorted(cache.iterdir())
    with pytest.raises(InvalidInputError, match="readable image"):
        CropDataset([source], cache)
    assert sorted(cache.iterdir()) == before
    (root / "images/gone.png").rename(root / "images/1.png")
    assert len(CropDataset([source], cache)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got no file"),
        ("{", "expected JSON"),
        ("[]", "COCO annotations"),
        ('{"images": [], "annotations": []}', "at least one object"),
    ],
)
def test_unusable_datasets_are_refused(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        CropDataset([CropSource(tmp_path)], tmp_path / "cache")


def test_validation_images_are_listed_once_and_exist(data_root: Path):
    listed = (Path(__file__).parent.parent / "benchmarks/ecssd_validation.txt").read_text().split()
    present = {path.name for path in (data_root / "ecssd/images").iterdir()}
    assert len(listed) == len(set(listed)) == 100 and set(listed) <= present
