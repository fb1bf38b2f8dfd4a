"""The bulk command on folders of mask images and on datasets of Hugging Face: the same kind comes out."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import bulk_cases
import numpy as np
import pytest
from bulk_cases import Run
from PIL import Image

from transfiner_refine import Refiner
from transfiner_refine.bulk.mask_folder import MaskFolder
from transfiner_refine.functional import rle

COUNT = 3


def save_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def refined_masks(folder: Path, number: int) -> np.ndarray:
    """What the refiner makes of the masks of a photo: ``(2, H, W)`` bool."""
    refiner = Refiner.from_pretrained(folder / "model")
    masks = np.stack(bulk_cases.coarse_masks(number))
    return refiner.refine(folder / "photos" / f"{number:03}.png", masks=masks, options=bulk_cases.OPTIONS).masks.numpy()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return partial(bulk_cases.run_here, monkeypatch, capfd)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bulk_cases.save_refiner(tmp_path_factory.mktemp("refiner"))


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    bulk_cases.make_photos(tmp_path / "photos", COUNT)
    (tmp_path / "model").symlink_to(model)
    return tmp_path


class TestMaskFolder:
    @pytest.fixture
    def masks(self, folder: Path) -> Path:
        """Two masks of each photo, one in each of the three ways of naming them; photo 2 has both in a subfolder."""
        names = [("000.png", "000_0.png"), ("001_000.png", "001_001.png"), ("002/cat.png", "002/dog.png")]
        for number, pair in enumerate(names):
            for name, mask in zip(pair, bulk_cases.coarse_masks(number), strict=True):
                save_mask(folder / "masks" / name, mask)
        return folder / "masks"

    def test_same_names_with_refined_masks(self, folder: Path, masks: Path, run: Run):
        code, out, err = run(bulk_cases.arguments(folder, predictions=masks, output=folder / "out"))
        assert code == 0, err
        assert "6 masks of 3 images refined" in out
        names = [path.relative_to(masks) for path in sorted(masks.rglob("*.png"))]
        assert [path.relative_to(folder / "out") for path in sorted((folder / "out").rglob("*.png"))] == names
        for number in range(COUNT):
            for name, mask in zip(names[2 * number : 2 * number + 2], refined_masks(folder, number), strict=True):
                assert np.array_equal(np.asarray(Image.open(folder / "out" / name)), mask * 255)

    def test_what_cannot_be_refined_is_copied(self, folder: Path, masks: Path, run: Run):
        (masks / "gone_000.png").write_bytes((masks / "000.png").read_bytes())
        (masks / "001_000.png").write_bytes(b"damaged")
        code, _, err = run(bulk_cases.arguments(folder, predictions=masks, output=folder / "out"))
        assert code == 0 and "2 of 4 images stay coarse" in err
        for name in ("gone_000.png", "001_000.png", "001_001.png"):
            assert (folder / "out" / name).read_bytes() == (masks / name).read_bytes()
        listed = json.loads((folder / "out.skipped.json").read_text())
        assert [entry["photo"] for entry in listed] == ["001", "gone"]
        code, _, err = run(bulk_cases.arguments(folder, predictions=masks, output=folder / "new", strict=True))
        assert code == 2 and "none named 'gone'" in err

    def test_a_photo_s_own_name_counts_first(self, tmp_path: Path):
        for name in ("a.png", "a_001.png"):
            save_mask(tmp_path / "photos" / name, bulk_cases.disc(50, 50, 20))
        for name in ("a_000.png", "a_001.png", "a_001_000.png"):
            save_mask(tmp_path / "masks" / name, bulk_cases.disc(50, 50, 20))
        source = MaskFolder(tmp_path / "photos", tmp_path / "masks")
        labels = {position: source.label(i) for i in range(len(source)) for position in source.positions(i)}
        assert labels == {0: "a", 1: "a_001", 2: "a_001"}

    def test_suffixes_in_capitals_are_masks_too(self, folder: Path, masks: Path):
        (masks / "000.png").rename(masks / "000.PNG")
        source = MaskFolder(folder / "photos", masks)
        assert source.record_count == 6 and source.load(0).coarse.masks.shape[0] == 2

    def test_masks_of_another_suffix_are_not_lost(self, folder: Path, masks: Path, run: Run):
        for name in ("002/cat.jpg", "001_002.TIF"):
            (masks / name).write_bytes(b"")
        code, _, err = run(bulk_cases.arguments(folder, predictions=masks, output=folder / "out"))
        assert code == 2 and "got 2 others, '001_002.TIF' the first" in err

    def test_what_is_no_file_is_no_mask(self, folder: Path, masks: Path, run: Run):
        (masks / "000_8.png").mkdir()
        (masks / "000_9.png").symlink_to(folder / "nowhere")
        (folder / "photos" / "001.jpg").mkdir()
        code, out, err = run(bulk_cases.arguments(folder, predictions=masks, output=folder / "out"))
        assert code == 0 and "6 masks of 3 images refined" in out, err
        assert sorted(path.name for path in (folder / "out").glob("000*")) == ["000.png", "000_0.png"]

    def test_folders_of_no_use(self, folder: Path, masks: Path, run: Run):
        def fails_with(message: str, **changed: object) -> None:
            code, _, err = run(
                bulk_cases.arguments(folder, **({"predictions": masks, "output": folder / "o"} | changed))
            )
            assert code == 2 and message in err, err

        fails_with("masks in a folder of their own", predictions=folder / "photos")
        fails_with("got none", predictions=folder / "model")
        fails_with("a new or an empty folder", output=masks)
        fails_with("expected --images", images=None)
        fails_with("leave it out", annotations=folder / "x.json")
        fails_with("a folder of images", images=folder / "none")
        (folder / "photos" / "000.jpg").write_bytes(b"")
        fails_with("expected one photo of each name")


class TestDatasets:
    """Rows of an image, two masks and a column of something else."""

    @pytest.fixture(autouse=True)
    def datasets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        datasets = pytest.importorskip("datasets", reason="datasets of Hugging Face: pip install '.[datasets]'")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 0)
        return datasets

    def build(self, datasets: Any, folder: Path, kind: str) -> Any:
        features: dict[str, Any] = {
            "rle": datasets.List({"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("binary")}),
            "images": datasets.List(datasets.Image()),
            "image": datasets.Image(),
        }

        def value(number: int) -> Any:
            masks = np.stack(bulk_cases.coarse_masks(number))
            if kind == "rle":
                return [{**code, "counts": code["counts"].encode()} for code in rle.encode(masks)]
            pictures = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
            return pictures if kind == "images" else pictures[0]

        rows = {
            "name": [f"ä{number}" for number in range(COUNT)],
            "picture": [str(folder / "photos" / f"{number:03}.png") for number in range(COUNT)],
            "objects": [value(number) for number in range(COUNT)],
        }
        columns = {"name": datasets.Value("string"), "picture": datasets.Image(), "objects": features[kind]}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))

    def words(self, folder: Path, **options: object) -> list[str]:
        defaults = {
            "images": None,
            "predictions": folder / "data",
            "output": folder / "out",
            "image_column": "picture",
            "masks_column": "objects",
        }
        return bulk_cases.arguments(folder, **(defaults | options))

    def decoded(self, kind: str, value: Any) -> np.ndarray:
        if kind == "rle":
            return rle.decode_batch(value, bulk_cases.SIZE)
        return np.stack([np.asarray(picture) == 255 for picture in (value if kind == "images" else [value])])

    @pytest.mark.parametrize("kind", ["rle", "images", "image"])
    def test_saved_to_disk(self, folder: Path, run: Run, datasets: Any, kind: str):
        given = self.build(datasets, folder, kind)
        given.save_to_disk(folder / "data")
        code, out, err = run(self.words(folder))
        assert code == 0, err
        assert "masks of 3 images refined" in out
        refined = datasets.load_from_disk(folder / "out")
        assert refined.features == given.features
        for number, (before, after) in enumerate(zip(given, refined, strict=True)):
            assert before["name"] == after["name"]
            assert np.array_equal(np.asarray(before["picture"]), np.asarray(after["picture"]))
            masks = self.decoded(kind, after["objects"])
            assert np.array_equal(masks, refined_masks(folder, number)[: len(masks)])

    def test_parquet_keeps_its_files(self, folder: Path, run: Run, datasets: Any):
        given = self.build(datasets, folder, "rle")
        (folder / "data").mkdir()
        given.select([0, 1]).to_parquet(folder / "data" / "a.parquet")
        given.select([2]).to_parquet(folder / "data" / "b.parquet")
        assert run(self.words(folder))[0] == 0
        assert sorted(os.listdir(folder / "out")) == ["a.parquet", "b.parquet"]
        names = [str(folder / "out" / name) for name in ("a.parquet", "b.parquet")]
        refined = datasets.Dataset.from_parquet(names)
        assert refined.features == given.features
        for number, row in enumerate(refined):
            assert np.array_equal(self.decoded("rle", row["objects"]), refined_masks(folder, number))

    def test_a_broken_image_is_skipped_and_kept(self, folder: Path, run: Run, datasets: Any):
        (folder / "photos" / "001.png").write_bytes(b"damaged")
        given = self.build(datasets, folder, "images")
        given.save_to_disk(folder / "data")
        code, _, err = run(self.words(folder))
        assert code == 0 and "1 of 3 images stay coarse" in err
        assert json.loads((folder / "out.skipped.json").read_text())[0]["row"] == 1
        row = datasets.load_from_disk(folder / "out").cast_column("picture", datasets.Image(decode=False))[1]
        assert row["picture"]["bytes"] == b"damaged"
        assert np.array_equal(self.decoded("images", row["objects"]), bulk_cases.coarse_masks(1))

    @pytest.mark.parametrize("kind", ["rle", "images"])
    def test_a_row_that_lacks_a_mask_is_skipped_and_kept(self, folder: Path, run: Run, datasets: Any, kind: str):
        given = self.build(datasets, folder, kind)
        lists = [[row[0], None, row[1]] if number == 1 else row for number, row in enumerate(given["objects"])]
        lists[2] = None
        columns = {"name": given["name"], "picture": given["picture"], "objects": lists}
        given = datasets.Dataset.from_dict(columns, features=given.features)
        given.save_to_disk(folder / "data")
        code, out, err = run(self.words(folder))
        assert code == 0 and "2 masks of 2 images refined" in out and "1 of 3 images stay coarse" in err, err
        (skipped,) = json.loads((folder / "out.skipped.json").read_text())
        assert skipped == {"row": 1, "reason": "expected 3 masks, got none at 1: leave it out"}
        refined = datasets.load_from_disk(folder / "out")
        assert refined[1]["objects"] == given[1]["objects"] and refined[2]["objects"] is None
        assert np.array_equal(self.decoded(kind, refined[0]["objects"]), refined_masks(folder, 0))

    def test_damaged_files_are_one_error(self, folder: Path, run: Run, datasets: Any):
        def fails() -> None:
            code, _, err = run(self.words(folder))
            errors = [line for line in err.splitlines() if "rror" in line]
            assert code == 2 and errors[-1].startswith(f"error: expected a dataset in {folder / 'data'}"), err
            assert "Traceback" not in err

        (folder / "data").mkdir()
        (folder / "data" / "dataset_info.json").write_text('{"of": "something else"}')
        fails()
        (folder / "data" / "dataset_info.json").unlink()
        given = self.build(datasets, folder, "rle")
        file = folder / "data" / "a.parquet"
        given.to_parquet(file)
        file.write_bytes(file.read_bytes()[:-100])
        fails()
        file.unlink()
        given.save_to_disk(folder / "data")
        (file,) = (folder / "data").glob("*.arrow")
        content = file.read_bytes()
        file.write_bytes(content[:10])
        fails()
        file.write_bytes(content[: len(content) // 2])
        fails()

    def test_columns_and_splits_of_no_use(self, folder: Path, run: Run, datasets: Any):
        given = self.build(datasets, folder, "rle")
        given.save_to_disk(folder / "data")

        def fails_with(message: str, **changed: object) -> None:
            code, _, err = run(self.words(folder, **changed))
            assert code == 2 and message in err, err

        fails_with("expected a column 'masks'", masks_column="masks")
        fails_with("to be images", image_column="name")
        fails_with("size and compressed counts", masks_column="name")
        fails_with("neither --images", images=folder / "photos")
        datasets.DatasetDict(train=given).save_to_disk(folder / "splits")
        fails_with("dataset of ['train']", predictions=folder / "splits")


def test_without_datasets_the_extra_is_named(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    (folder / "data").mkdir()
    (folder / "data" / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run(bulk_cases.arguments(folder, images=None, predictions=folder / "data", output=folder / "out"))
    assert code == 2 and "transfiner-refine[datasets]" in err
