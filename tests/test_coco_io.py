"""COCO files and mask images, read and written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transfiner_refine.data import coco
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle

ASSETS = Path(coco.__file__).parent.parent / "assets" / "demo"
SQUARE = [[1.0, 1.0, 4.0, 1.0, 4.0, 4.0, 1.0, 4.0]]


def entry(image_id: object = 1, **fields: object) -> dict:
    return {"image_id": image_id, "segmentation": SQUARE, **fields}


def written(folder: Path, value: object) -> Path:
    path = folder / "file.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_results_come_back_as_they_are_written(tmp_path: Path):
    results = [entry(3, score=0.5, soft28="abc"), entry("b"), entry(3, bbox=[0, 0, 0.5, 2])]
    coco.write_json_atomic(tmp_path / "new" / "folder" / "out.json", results)
    assert coco.load_results(tmp_path / "new" / "folder" / "out.json") == results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not JSON"),
        ("", "is not JSON"),
        ({"images": [], "annotations": []}, "that is an annotations file"),
        ({"results": []}, "got an object with the keys 'results': write the list alone"),
        ("3", "got int"),
        ([entry(), 7], "entry 1: expected an object, got 7"),
        ([{"image_id": 1, "bbox": [0, 0, 1, 1]}], "entry 0: .* got no segmentation"),
        ([entry(), entry(None)], "entry 1: expected an image_id"),
        ([entry(True)], "entry 0: expected an image_id"),
        ([entry(bbox=[0, 0, 1])], "entry 0: expected bbox"),
        ([entry(bbox=[0, 0, -1, 1])], "entry 0: expected bbox"),
        ('[{"image_id": 1, "segmentation": [], "bbox": [0, 0, NaN, 1]}]', "entry 0: expected bbox"),
        ([entry(bbox=[0, 0, "1", 1])], "entry 0: expected bbox"),
    ],
)
def test_a_results_file_that_is_none_is_refused(tmp_path: Path, content: object, message: str):
    with pytest.raises(InvalidInputError, match=message):
        coco.load_results(written(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"none\.json: No such file"):
        coco.load_results(tmp_path / "none.json")


@pytest.mark.parametrize("content", [[], {"annotations": []}, {"images": [{"id": 1}]}, {"images": [{"file_name": ""}]}])
def test_an_annotations_file_needs_its_images(tmp_path: Path, content: object):
    with pytest.raises(InvalidInputError, match="images"):
        coco.load_image_index(written(tmp_path, content))


def test_an_id_has_one_file(tmp_path: Path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "a.jpg"}]
    assert coco.load_image_index(written(tmp_path, {"images": images})) == {1: "a.jpg"}
    images.append({"id": 1, "file_name": "b.jpg"})
    with pytest.raises(InvalidInputError, match=r"got 'a.jpg' and 'b.jpg' for 1"):
        coco.load_image_index(written(tmp_path, {"images": images}))


def test_what_is_written_is_kept_apart(tmp_path: Path):
    a, b, link = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "link.json"
    link.symlink_to(a)
    coco.check_apart({"--output": a, "--summary": None}, {"--predictions": b, "--annotations": None})
    for outputs, inputs in (({"--output": a}, {"--predictions": link}), ({"--output": a, "--predictions": link}, {})):
        with pytest.raises(InvalidInputError, match=r"expected a file of its own for --.*, which is also --"):
            coco.check_apart(outputs, inputs)


def test_numbers_beyond_all_floats_are_refused(tmp_path: Path):
    assert "bbox" in str(coco.entry_fault(entry(1) | {"bbox": [10**400, 0, 1, 1]}))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InvalidInputError, match="nested too deeply"):
        coco.load_json(tmp_path / "deep.json")


def test_groups_keep_the_order_of_the_file():
    assert coco.group_by_image([entry(2), entry(1), entry(2)]) == {2: [0, 2], 1: [1]}


class TestFindImages:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("000000000139.jpg", "7.PNG", "cat.jpeg", "139.txt"):
            (tmp_path / name).touch()
        return tmp_path

    def test_by_name(self, folder: Path):
        found = coco.find_images(folder, [139, 7, "cat", "000000000139"])
        assert {key: path.name for key, path in found.items()} == {
            139: "000000000139.jpg",
            7: "7.PNG",
            "cat": "cat.jpeg",
            "000000000139": "000000000139.jpg",
        }

    def test_by_annotations(self, folder: Path):
        assert coco.find_images(folder, [1], {1: "cat.jpeg", 2: "elsewhere.jpg"}) == {1: folder / "cat.jpeg"}

    @pytest.mark.parametrize(
        ("ids", "names", "message"),
        [
            ([139, 5], None, "got 1 without: 5; give the annotations"),
            (["139"], None, "got 1 without: '139'"),
            ([1, 2], {1: "cat.jpeg"}, "got 1 unknown: 2"),
            ([1, 2], {1: "cat.jpeg", 2: "dog.jpeg"}, "1 missing: 'dog.jpeg'"),
            (list(range(20)), {}, "got 20 unknown: 0, 1, 2, 3, 4 and 15 more"),
        ],
    )
    def test_what_cannot_be_found_is_named(self, folder: Path, ids: list, names: dict | None, message: str):
        with pytest.raises(InvalidInputError, match=message):
            coco.find_images(folder, ids, names)

    def test_two_files_for_an_id_are_an_error_only_if_it_is_wanted(self, folder: Path):
        (folder / "0007.jpg").touch()
        assert list(coco.find_images(folder, [139])) == [139]
        with pytest.raises(InvalidInputError, match=r"image_id 7, got '0007.jpg', '7.PNG'"):
            coco.find_images(folder, [7])

    def test_another_folder_s_photo_of_the_same_name_is_not_taken(self, tmp_path: Path):
        """Frames of videos all have the same names."""
        folder = tmp_path / "bear"
        folder.mkdir()
        (folder / "00000.jpg").touch()
        names: dict[int | str, str] = {1: "bear/00000.jpg", 2: "goat/00000.jpg"}
        assert coco.find_images(folder, [1, 2], names, missing_ok=True) == {1: folder / "00000.jpg"}
        with pytest.raises(InvalidInputError, match=r"1 missing: '00000.jpg'"):
            coco.find_images(folder, [1, 2], names)
        alone: dict[int | str, str] = {1: "train2017/00000.jpg"}  # whatever the folder of a copied set is called
        assert coco.find_images(folder, [1], alone) == {1: folder / "00000.jpg"}

    def test_a_name_that_no_file_can_have_is_missing(self, folder: Path):
        with pytest.raises(InvalidInputError, match="1 missing"):
            coco.find_images(folder, [1], {1: "x" * 300 + ".jpg"})

    def test_no_folder(self, tmp_path: Path):
        with pytest.raises(InvalidInputError, match="expected a folder of images"):
            coco.find_images(tmp_path / "none", [1])


def test_masks_of_chosen_entries(rng: np.random.Generator):
    masks = rng.random((3, 5, 6)) < 0.5
    results = [entry(segmentation=code) for code in rle.encode(masks)]
    assert np.array_equal(coco.decode_masks(results, [2, 0], (5, 6)), masks[[2, 0]])
    results[2]["segmentation"]["counts"] = "~~"
    with pytest.raises(InvalidInputError, match="entry 2: "):
        coco.decode_masks(results, [0, 2], (5, 6))


def test_boxes_fall_back_on_the_mask():
    entries = [entry(bbox=[1, 2, 3, 4]), entry(), entry(bbox=[9, 9, 0, 4]), entry(bbox=[5, 5, 0, 0])]
    mask_boxes = torch.tensor([[0, 0, 9, 9], [2, 2, 5, 6], [1, 1, 4, 4], [0, 0, 0, 0]]).float()
    expected = [[1, 2, 4, 6], [2, 2, 5, 6], [1, 1, 4, 4], [0, 0, 1, 1]]
    assert coco.boxes_of(entries, mask_boxes).tolist() == expected
    assert coco.boxes_of([], torch.zeros(0, 4)).shape == (0, 4)


class TestWriteAtomic:
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tmp_path / "out.json"
        path.write_text("old")

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(InvalidInputError, match=r"out\.json, got: No space left"):
            coco.write_json_atomic(path, [1])
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["out.json"]

    def test_an_interrupt_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tmp_path / "out.json"
        path.write_text("old")

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            coco.write_json_atomic(path, [1])
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["out.json"]

    def test_a_link_is_written_through(self, tmp_path: Path):
        (tmp_path / "target.json").write_text("old")
        link = tmp_path / "link.json"
        link.symlink_to("target.json")
        coco.write_json_atomic(link, [])
        assert link.is_symlink()
        assert (tmp_path / "target.json").read_text() == "[]"

    def test_others_may_read_it_as_any_new_file(self, tmp_path: Path):
        (tmp_path / "usual").touch()
        coco.write_atomic(tmp_path / "out", b"")
        assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_folder_or_a_file_on_the_way_is_refused(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(InvalidInputError, match="got the folder"):
            coco.check_output(tmp_path)
        with pytest.raises(InvalidInputError, match="expected a folder for"):
            coco.check_output(tmp_path / "file" / "out.json")


class TestReadMask:
    def read(self, folder: Path, values: np.ndarray, mode: str | None = None) -> np.ndarray:
        path = folder / "mask.png"
        image = Image.fromarray(values)
        if mode is not None:
            image = image.convert(mode)
        image.save(path)
        return read_mask(path, values.shape[:2])

    @pytest.mark.parametrize("value", [1, 128, 255])
    @pytest.mark.parametrize("mode", [None, "RGB", "LA"])
    def test_two_values(self, tmp_path: Path, value: int, mode: str | None):
        values = np.array([[0, value, 0], [value, 0, 0]], np.uint8)
        found = self.read(tmp_path, values, mode)
        assert found.dtype == bool
        assert np.array_equal(found, values > 0)

    @pytest.mark.parametrize("value", [0, 255])
    def test_one_value(self, tmp_path: Path, value: int):
        assert self.read(tmp_path, np.full((2, 3), value, np.uint8)).tolist() == [[value > 0] * 3] * 2

    def test_one_bit(self, tmp_path: Path):
        assert self.read(tmp_path, np.array([[0, 255]], np.uint8), "1").tolist() == [[False, True]]

    def test_soft_edges_are_probabilities(self, tmp_path: Path):
        found = self.read(tmp_path, np.array([[0, 51, 255]], np.uint8))
        assert found.dtype == np.float32
        assert found.tolist() == pytest.approx(np.array([[0, 0.2, 1]]))

    def test_a_cut_out_is_its_alpha(self, tmp_path: Path):
        values = np.full((2, 2, 4), 200, np.uint8)
        values[..., 3] = [[0, 255], [255, 0]]
        assert self.read(tmp_path, values).tolist() == [[False, True], [True, False]]

    def test_instance_numbers_are_refused(self, tmp_path: Path):
        with pytest.raises(InvalidInputError, match="split a map of instance numbers"):
            self.read(tmp_path, np.array([[0, 1, 2]], np.uint8))

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_a_palette_is_read_by_its_colours(self, tmp_path: Path, mode: str):
        """Which of two colours has the number 0 is up to the program that wrote the file."""
        values = np.zeros((6, 8), np.uint8)
        values[1:3, 2:4] = 255
        picture = Image.fromarray(values).convert(mode).quantize(2)
        black_first = Image.fromarray((values > 0).astype(np.uint8))
        black_first.putpalette([0, 0, 0, 128, 0, 0])
        for number, image in enumerate((picture, picture.point(lambda x: 1 - x), black_first)):
            if number == 1:
                palette = picture.getpalette()
                assert palette is not None
                image.putpalette(palette[3:6] + palette[:3])
            image.save(tmp_path / f"{number}.png")
            assert np.array_equal(read_mask(tmp_path / f"{number}.png", (6, 8)), values > 0)
        whole = Image.fromarray(np.ones((6, 8), np.uint8))
        whole.putpalette([0, 0, 0, 128, 0, 0])
        whole.save(tmp_path / "whole.png")
        assert read_mask(tmp_path / "whole.png", (6, 8)).all()
        black_first.putpalette([200, 0, 0, 128, 0, 0])
        black_first.save(tmp_path / "coloured.png")
        with pytest.raises(InvalidInputError, match="on black, got the colours"):
            read_mask(tmp_path / "coloured.png", (6, 8))

    @pytest.mark.parametrize(
        "colours", [((255, 0, 0), (0, 255, 0)), ((128, 0, 0), (0, 128, 0)), ((9, 0, 0), (0, 9, 9))]
    )
    def test_instances_by_colours_are_refused(self, tmp_path: Path, colours: tuple):
        values = np.zeros((4, 6, 3), np.uint8)
        values[:2, :2] = colours[0]
        assert np.array_equal(self.read(tmp_path, values), values.any(axis=2))
        values[2:, 3:] = colours[1]
        with pytest.raises(InvalidInputError, match="split a map of instances by colours"):
            self.read(tmp_path, values)

    def test_a_grey_jpeg_is_grey(self, tmp_path: Path):
        values = np.zeros((32, 32), np.uint8)
        values[9:23, 9:23] = 255
        Image.fromarray(values).convert("RGB").save(tmp_path / "mask.jpg", quality=60)
        found = read_mask(tmp_path / "mask.jpg", (32, 32))
        assert found.dtype == np.float32 and np.array_equal(found > 0.5, values > 0)

    def test_another_size_is_refused(self, tmp_path: Path):
        Image.new("L", (3, 2)).save(tmp_path / "mask.png")
        with pytest.raises(InvalidInputError, match=r"5 x 4 pixels, got 3 x 2"):
            read_mask(tmp_path / "mask.png", (4, 5))

    def test_no_image_is_refused(self, tmp_path: Path):
        (tmp_path / "mask.png").write_text("no image")
        for name in ("mask.png", "none.png"):
            with pytest.raises(InvalidInputError, match="expected a mask image"):
                read_mask(tmp_path / name, (4, 5))


class TestDemoAssets:
    def test_every_photo_has_a_detection_that_fits(self):
        names = coco.load_image_index(ASSETS / "outlines.json")
        results = coco.load_results(ASSETS / "detections.json")
        groups = coco.group_by_image(results)
        assert set(groups) == set(names)
        for image_id, path in coco.find_images(ASSETS, groups, names).items():
            with Image.open(path) as photo:
                masks = coco.decode_masks(results, groups[image_id], (photo.height, photo.width))
            assert masks.any(axis=(1, 2)).all()

    def test_outlines_say_that_they_are_drawn_by_hand_and_fit_their_boxes(self):
        document = json.loads((ASSETS / "outlines.json").read_text())
        assert "Hand-drawn" in document["info"]["description"]
        assert document["info"]["contributor"] == "the project's authors"
        sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
        for annotation in coco.load_annotations(ASSETS / "outlines.json"):
            mask = rle.decode(annotation["segmentation"], sizes[annotation["image_id"]])
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
            assert annotation["area"] == mask.sum()

    def test_every_photo_has_a_licence(self):
        notice = (ASSETS / "NOTICE.md").read_text()
        assert all(f"`{path.name}`" in notice for path in ASSETS.glob("*.jpg"))
