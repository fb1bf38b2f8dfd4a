"""Data sets in their own layouts: tiny made-up copies of each come back in COCO's form."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from transfiner_refine.data.datasets import CocoDataset, Layout, load_coco, load_dataset
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.rle import decode

H, W = 12, 20
TRIANGLE = [[2.0, 2.0, 9.0, 2.0, 2.0, 9.0]]


def write_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def coco_document() -> dict:
    return {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": H, "width": W} for i in (7, 139)],
        "annotations": [
            {"id": 1, "image_id": 139, "category_id": 18, "segmentation": TRIANGLE, "iscrowd": 0},
            {"id": 2, "image_id": 139, "category_id": 1, "segmentation": {"size": [H, W], "counts": [0, H * W]}},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for name in ("000000000007.jpg", "000000000139.jpg"):
        write_image(root / "val2017" / name, np.zeros((H, W, 3), np.uint8))
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_document()))
    return root


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """A street with road (7), two cars, a group of cars (26), a rider and a trailer (30); and an empty street."""
    root = tmp_path / "cityscapes"
    street = np.full((H, W), 7, np.uint16)
    street[1:4, 2:7] = 26000
    street[2, 3] = 25003  # the rider hides a part of the car
    street[5:9, 0:3] = 26001
    street[5:9, 17:20] = 26
    street[10:12, 5:9] = 30000
    for name, values in (("ulm/ulm_000001_000019", street), ("aachen/aachen_000000_000019", street * 0 + 7)):
        write_image(root / "gtFine" / "train" / f"{name}_gtFine_instanceIds.png", values)
        write_image(root / "gtFine" / "train" / f"{name}_gtFine_labelIds.png", values.astype(np.uint8))
        write_image(root / "leftImg8bit" / "train" / f"{name}_leftImg8bit.png", np.zeros((H, W, 3), np.uint8))
    return root


@pytest.fixture
def bdd100k(tmp_path: Path) -> Path:
    """Cars 1 (occluded and truncated) and 258, a crowd of pedestrians, and an ignored region."""
    root = tmp_path / "bdd100k"
    bitmask = np.zeros((H, W, 4), np.uint8)
    bitmask[1:4, 2:7] = (3, 0b1100, 0, 1)
    bitmask[1:4, 7:9] = (3, 0, 1, 2)  # touches car 1; its number needs both bytes
    bitmask[6:9, 0:4] = (1, 0b0010, 0, 3)
    bitmask[6:9, 10:14] = (1, 0b0001, 0, 4)
    write_image(root / "labels" / "ins_seg" / "bitmasks" / "val" / "b1.png", bitmask)
    for name in ("b1", "unlabelled"):
        write_image(root / "images" / "10k" / "val" / f"{name}.jpg", np.zeros((H, W, 3), np.uint8))
    return root


def summary(dataset: CocoDataset) -> list[tuple]:
    """Image, category, crowd, box and area of each annotation."""
    names = {image["id"]: image["file_name"] for image in dataset.images}
    return [(names[x["image_id"]], x["category_id"], x["iscrowd"], x["bbox"], x["area"]) for x in dataset.annotations]


def masks(dataset: CocoDataset) -> list[np.ndarray]:
    return [decode(x["segmentation"], (H, W)) for x in dataset.annotations]


class TestCoco:
    def test_comes_back_as_it_is(self, coco: Path):
        dataset = load_dataset("coco", coco, "val2017")
        document = coco_document()
        assert (dataset.images, dataset.annotations, dataset.categories) == tuple(document.values())
        assert [dataset.path_of(image).is_file() for image in dataset.images] == [True, True]

    def test_annotations_go_with_their_image(self, coco: Path):
        groups = load_dataset("coco", coco, "val2017").by_image()
        assert {key: [x["id"] for x in entries] for key, entries in groups.items()} == {7: [], 139: [1, 2]}

    @pytest.mark.parametrize(
        ("section", "change", "message"),
        [
            ("annotations", {"image_id": 8}, r"annotation 0: expected an image .* got image_id 8"),
            ("annotations", {"category_id": 3}, r"annotation 0: .* category_id 3"),
            ("annotations", {"segmentation": ...}, r"annotation 0: .* got no segmentation"),
            ("images", {"height": ...}, r'expected "height" and "width"'),
            ("images", {"file_name": ...}, r'expected a "file_name" .* got none for \[7\]'),
        ],
    )
    def test_what_does_not_fit_is_named(self, coco: Path, section: str, change: dict, message: str):
        document = coco_document()
        changed = document[section][0] | change
        document[section][0] = {key: value for key, value in changed.items() if value is not ...}
        (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
        with pytest.raises(InvalidInputError, match=message):
            load_dataset("coco", coco, "val2017")


class TestCityscapes:
    def test_instances_and_groups(self, cityscapes: Path):
        dataset = load_dataset("cityscapes", cityscapes, "train")
        ulm = "ulm/ulm_000001_000019_leftImg8bit.png"
        assert summary(dataset) == [
            (ulm, 26, 1, [17, 5, 3, 4], 12),
            (ulm, 25, 0, [3, 2, 1, 1], 1),
            (ulm, 26, 0, [2, 1, 5, 3], 14),
            (ulm, 26, 0, [0, 5, 3, 4], 12),
        ]
        assert not masks(dataset)[2][2, 3], "what hides the car is not of the car"
        assert len(dataset.categories) == 8 and {"id": 33, "name": "bicycle"} in dataset.categories

    def test_images_without_instances_are_kept(self, cityscapes: Path):
        dataset = load_dataset("cityscapes", cityscapes, "train")
        assert [image["file_name"].split("/")[0] for image in dataset.images] == ["aachen", "ulm"]
        assert dataset.images[0] | {"file_name": ""} == {"id": 1, "file_name": "", "height": H, "width": W}
        assert dataset.by_image()[1] == []
        assert dataset.path_of(dataset.images[1]).is_file()

    def test_label_images_of_another_kind_are_refused(self, cityscapes: Path):
        target = cityscapes / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine_instanceIds.png"
        write_image(target, np.zeros((H, W, 3), np.uint8))
        with pytest.raises(InvalidInputError, match=r"expected instance ids in one channel, got \(12, 20, 3\) uint8"):
            load_dataset("cityscapes", cityscapes, "train")


class TestBdd100k:
    def test_instances_crowds_and_ignored_regions(self, bdd100k: Path):
        dataset = load_dataset("bdd100k", bdd100k, "val")
        assert summary(dataset) == [
            ("b1.jpg", 1, 1, [10, 6, 4, 3], 12),
            ("b1.jpg", 1, 1, [0, 6, 4, 3], 12),
            ("b1.jpg", 3, 0, [7, 1, 2, 3], 6),
            ("b1.jpg", 3, 0, [2, 1, 5, 3], 15),
        ]
        assert dataset.categories[2] == {"id": 3, "name": "car"}

    def test_masks_are_the_pixels_of_the_bitmask(self, bdd100k: Path):
        (*_, car_258, car_1) = masks(load_dataset("bdd100k", bdd100k, "val"))
        expected = np.zeros((H, W), bool)
        expected[1:4, 2:7] = True
        assert np.array_equal(car_1, expected)
        assert np.array_equal(car_258, np.roll(expected, 5, axis=1) & (np.arange(W) < 9))

    @pytest.mark.parametrize(
        ("pixels", "message"),
        [
            (np.zeros((H, W, 3), np.uint8), "expected a bitmask with the channels RGBA"),
            (np.full((H, W, 4), 35, np.uint8), r"expected categories 1 to 8 in the red channel, got \[35\]"),
        ],
    )
    def test_bitmasks_of_another_task_are_refused(self, bdd100k: Path, pixels: np.ndarray, message: str):
        write_image(bdd100k / "labels" / "ins_seg" / "bitmasks" / "val" / "b1.png", pixels)
        with pytest.raises(InvalidInputError, match=message):
            load_dataset("bdd100k", bdd100k, "val")


@pytest.mark.parametrize(("layout", "split"), [("cityscapes", "train"), ("bdd100k", "val")])
class TestLabelImages:
    # pycocotools 2.0.11: its decode() under numpy 2.
    @pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
    def test_pycocotools_reads_what_is_saved(
        self, layout: Layout, split: str, request: pytest.FixtureRequest, tmp_path: Path
    ):
        dataset = load_dataset(layout, request.getfixturevalue(layout), split)
        dataset.save(tmp_path / "saved.json")
        saved: Any = COCO(tmp_path / "saved.json")
        assert sorted(saved.anns) == [1, 2, 3, 4]
        for entry, mask in zip(dataset.annotations, masks(dataset), strict=True):
            assert np.array_equal(saved.annToMask(entry), mask)
            assert mask.sum() == entry["area"]
        assert load_coco(tmp_path / "saved.json", dataset.folder) == dataset

    def test_a_label_image_without_its_photo_is_named(self, layout: Layout, split: str, request: pytest.FixtureRequest):
        root = request.getfixturevalue(layout)
        photo = next(path for path in sorted(root.rglob("*")) if path.name in {"b1.jpg", *_photos("ulm")})
        photo.unlink()
        with pytest.raises(InvalidInputError, match=rf"got 1 missing: .*{photo.name}"):
            load_dataset(layout, root, split)

    def test_a_damaged_label_image_is_named(self, layout: Layout, split: str, request: pytest.FixtureRequest):
        root = request.getfixturevalue(layout)
        label = next(path for path in sorted(root.rglob("*.png")) if path.name.endswith(("instanceIds.png", "b1.png")))
        label.write_bytes(label.read_bytes()[:40])
        with pytest.raises(InvalidInputError, match=f"expected a label image, got .*{label.name}"):
            load_dataset(layout, root, split)


def _photos(city: str) -> set[str]:
    return {f"{city}_000001_000019_leftImg8bit.png"}


@pytest.mark.parametrize(
    ("layout", "split", "folder"),
    [
        ("coco", "val2017", "annotations"),
        ("coco", "val2017", "val2017"),
        ("cityscapes", "train", "gtFine"),
        ("cityscapes", "train", "leftImg8bit/train"),
        ("bdd100k", "val", "images/10k"),
        ("bdd100k", "val", "labels/ins_seg/bitmasks"),
    ],
)
def test_a_missing_folder_is_named(layout: Layout, split: str, folder: str, request: pytest.FixtureRequest):
    root = request.getfixturevalue(layout)
    shutil.rmtree(root / folder)
    missing = root / folder
    with pytest.raises(
        InvalidInputError, match=rf"{missing.parent} has no {missing.name}; check the root and the split"
    ):
        load_dataset(layout, root, split)


@pytest.mark.parametrize(
    ("layout", "split", "message"),
    [
        ("coco", "train2017", "coco has no train2017"),
        ("cityscapes", "val", "leftImg8bit has no val"),
        ("bdd100k", "train", "10k has no train"),
    ],
)
def test_an_unknown_split_is_named(layout: Layout, split: str, message: str, request: pytest.FixtureRequest):
    with pytest.raises(InvalidInputError, match=message):
        load_dataset(layout, request.getfixturevalue(layout), split)


def test_an_unknown_layout_is_named(tmp_path: Path):
    with pytest.raises(InvalidInputError, match="expected a layout of coco, cityscapes, bdd100k, got 'lvis'"):
        load_dataset("lvis", tmp_path, "train")  # pyright: ignore[reportArgumentType]


def test_an_empty_folder_of_labels_is_named(bdd100k: Path):
    (bdd100k / "labels" / "ins_seg" / "bitmasks" / "val" / "b1.png").unlink()
    with pytest.raises(InvalidInputError, match=r"expected label images in .*val, got none"):
        load_dataset("bdd100k", bdd100k, "val")
