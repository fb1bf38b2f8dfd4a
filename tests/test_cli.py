"""The commands: what they write, and one clear line where they cannot."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

from transfiner_refine import cli
from transfiner_refine.commands.options import REFINE_OPTIONS
from transfiner_refine.config import RefineOptions, TransfinerConfig
from transfiner_refine.functional import rle
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner

SIZE = 48, 64  # H, W of the test photos
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small refiner that finds every cell incoherent and labels it object: the box becomes the mask."""
    torch.manual_seed(0)
    config = TransfinerConfig(
        feature_source="image_encoder",
        feature_channels=8,
        strides=(2, 4, 8, 16, 32),
        depth=2,
        channels=8,
        layers=1,
        heads=1,
        ffn_channels=8,
        decoder="residual",
    )
    model = RefinerModel(config)
    with torch.no_grad():
        detector = model.transfiner.incoherence_detector
        for classifier in (detector.classifier, *detector.finer_classifier):
            classifier.weight.zero_()  # type: ignore[operator]
            classifier.bias.fill_(5)  # type: ignore[operator]
        model.transfiner.pixel_decoder.layers[2].bias.fill_(20)  # type: ignore[operator]
    return Refiner(model).save_pretrained(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; returns the exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["transfiner-refine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture
def photos(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("000000000007.png", "000000000012.png"):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / name)
    return folder


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def result(image_id: object, mask: np.ndarray, box: tuple[float, ...] | None, **fields: object) -> dict:
    """A result of which every field but the segmentation should come back."""
    (code,) = rle.encode(mask[None])
    found = {"image_id": image_id, "category_id": 3, "segmentation": code, "score": 0.25, **fields}
    return found if box is None else {**found, "bbox": list(box)}


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def decoded(entry: dict) -> np.ndarray:
    return rle.decode(entry["segmentation"], SIZE)


def assert_one_error(outcome: tuple[int, str, str], message: str = "") -> None:
    code, _, err = outcome
    lines = [line for line in err.splitlines() if not line.startswith("Refining")]  # the bar
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err


class TestCoco:
    @pytest.fixture
    def results(self) -> list[dict]:
        """Boxes of 32 by 24 pixels around masks of 24 by 24: the images are mixed, the forms too."""
        polygon = result(7, rectangle(0, 0, 1, 1), (8, 8, 32, 24), tag="polygon")
        polygon["segmentation"] = [[8.0, 8.0, 32.0, 8.0, 32.0, 32.0, 8.0, 32.0]]
        return [
            result(12, rectangle(8, 8, 32, 32), (8, 8, 32, 24), soft28="kept", nested={"a": [1, None]}),
            polygon,
            result(12, rectangle(16, 16, 40, 40), (16, 16, 32, 24)),
            result(7, rectangle(10, 10, 20, 20), None, tag="no box"),
            result(7, rectangle(0, 0, 0, 0), (5, 5, 0, 0), tag="empty"),
        ]

    def test_only_segmentations_change(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path, results: list):
        output = tmp_path / "new" / "refined.json"
        predictions = write(tmp_path / "dets.json", results)
        code, out, err = run(
            "coco", "--images", photos, "--predictions", predictions, "--output", output, "--model", model_dir
        )
        assert code == 0, err
        assert "5 masks of 2 images refined, 0 kept coarse" in out
        refined = json.loads(output.read_text())
        for before, after in zip(results, refined, strict=True):
            assert list(before) == list(after)
            assert {**before, "segmentation": None} == {**after, "segmentation": None}
            assert isinstance(after["segmentation"]["counts"], str)
        assert np.array_equal(decoded(refined[0]), rectangle(8, 8, 40, 32))
        assert np.array_equal(decoded(refined[1]), rectangle(8, 8, 40, 32))
        assert np.array_equal(decoded(refined[2]), rectangle(16, 16, 48, 40) | rectangle(16, 16, 40, 40))
        assert np.array_equal(decoded(refined[3]), rectangle(10, 10, 20, 20))
        assert not decoded(refined[4]).any()
        assert json.loads(predictions.read_text()) == results

    def test_options_reach_the_refiner(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path, results: list):
        common = ["coco", "--images", photos, "--predictions", write(tmp_path / "dets.json", results)]
        common += ["--model", model_dir, "--output", tmp_path / "out.json"]
        code, out, _ = run(*common, "--keep-if-iou-below", 0.9, "--depth", 1, "--token-budget", 100)
        assert code == 0 and "3 kept coarse" in out
        kept = json.loads((tmp_path / "out.json").read_text())
        assert all(np.array_equal(decoded(a), decoded(b)) for a, b in zip(kept, results, strict=True))
        assert_one_error(run(*common, "--depth", 3), "depth of at most 2")
        assert_one_error(run(*common, "--depth", "deep"), 'depth 0 to 4, "auto" or None')
        assert run(*common, "--depth", "auto")[0] == 0

    def test_annotations_name_the_files(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        predictions = write(tmp_path / "dets.json", [result("a", rectangle(8, 8, 32, 32), (8, 8, 32, 24))])
        annotations = write(tmp_path / "ann.json", {"images": [{"id": "a", "file_name": "000000000007.png"}]})
        arguments = ["coco", "--images", photos, "--predictions", predictions, "--output", tmp_path / "out.json"]
        assert_one_error(run(*arguments, "--model", model_dir), "named after every image_id")
        assert run(*arguments, "--annotations", annotations, "--model", model_dir)[0] == 0
        assert np.array_equal(decoded(json.loads((tmp_path / "out.json").read_text())[0]), rectangle(8, 8, 40, 32))

    def test_no_results_give_none(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        predictions = write(tmp_path / "dets.json", [])
        arguments = ["--images", photos, "--predictions", predictions, "--output", predictions, "--model", model_dir]
        assert run("coco", *arguments)[0] == 0
        assert predictions.read_text() == "[]"

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            ("{not json", "not JSON"),
            ({"annotations": [], "images": []}, "that is an annotations file"),
            ([{"image_id": 7}], "segmentation"),
            ([result(99, rectangle(0, 0, 9, 9), (0, 0, 9, 9))], "99"),
            ([result(7, rectangle(0, 0, 9, 9), (0, 0, float("inf"), 9))], "entry 0: expected bbox"),
            ([{"image_id": 7, "segmentation": {"size": list(SIZE), "counts": "zz~"}}], "image_id 7: entry 0: "),
            ([{"image_id": 7, "segmentation": {"size": [5, 5], "counts": [25]}}], "belongs to another image"),
            ([{"image_id": 7, "segmentation": [[1, 2, 3]]}], "at least 3 points"),
        ],
    )
    def test_a_broken_file_is_one_line_and_leaves_the_old_output(
        self, run: Run, photos: Path, tmp_path: Path, model_dir: Path, broken: object, message: str
    ):
        if isinstance(broken, list):  # what can be refined comes first: the run fails in its middle
            broken = [result(12, rectangle(8, 8, 32, 32), (8, 8, 32, 24)), *broken]
            message = message.replace("entry 0", "entry 1")
        predictions = write(tmp_path / "dets.json", broken)
        output = write(tmp_path / "refined.json", "old")
        arguments = ["--images", photos, "--predictions", predictions, "--output", output, "--model", model_dir]
        assert_one_error(run("coco", "--strict", *arguments), message)
        assert output.read_text() == "old"
        assert sorted(os.listdir(tmp_path)) == ["dets.json", "photos", "refined.json"]

    def test_files_that_are_missing_or_damaged(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        predictions = write(tmp_path / "dets.json", [result(7, rectangle(8, 8, 32, 32), (8, 8, 32, 24))])
        annotations = write(tmp_path / "ann.json", {"images": [{"id": 7, "file_name": "gone.png"}]})

        def fails_with(message: str, **changed: object) -> None:
            given = {"images": photos, "predictions": predictions, "output": tmp_path / "out.json", "model": model_dir}
            arguments = [part for name, value in (given | changed).items() for part in (f"--{name}", value)]
            assert_one_error(run("coco", *arguments), message)
            assert not (tmp_path / "out.json").exists()

        fails_with("expected a folder of images", images=tmp_path / "none")
        fails_with("1 missing: 'gone.png'", annotations=annotations)
        fails_with("No such file", predictions=tmp_path / "none.json")
        fails_with("got the folder", output=tmp_path)
        fails_with("expected a device", device="tpu9")
        fails_with("none", model=tmp_path / "none")
        (photos / "000000000007.png").write_bytes(b"no image")
        fails_with("expected an image file", images=photos)


class TestImage:
    def test_predictions(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        results = [
            result(12, rectangle(8, 8, 32, 32), (8, 8, 32, 24)),
            result(7, rectangle(8, 8, 32, 32), (8, 8, 32, 24), tag="mine"),
        ]
        predictions = write(tmp_path / "dets.json", results)
        photo = photos / "000000000007.png"
        code, out, err = run(
            "image", photo, "--predictions", predictions, "--output", tmp_path / "out", "--model", model_dir
        )
        assert code == 0, err
        assert "1 masks refined" in out
        (refined,) = json.loads((tmp_path / "out" / "refined.json").read_text())
        assert {**refined, "segmentation": None} == {**results[1], "segmentation": None}
        assert np.array_equal(decoded(refined), rectangle(8, 8, 40, 32))
        pictures = {f"000000000007_{kind}.png" for kind in ("before_after", "incoherence", "quadtree")}
        assert set(os.listdir(tmp_path / "out")) == {"refined.json", *pictures}
        for name in pictures:
            with Image.open(tmp_path / "out" / name) as picture:
                picture.load()

    def test_results_of_one_image_are_this_image(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        predictions = write(tmp_path / "dets.json", [result(3, rectangle(8, 8, 32, 32), None)] * 2)
        arguments = ["--predictions", predictions, "--output", tmp_path / "out", "--model", model_dir]
        assert run("image", photos / "000000000007.png", *arguments)[0] == 0
        write(predictions, [result(image_id, rectangle(8, 8, 32, 32), None) for image_id in (3, 4)])
        assert_one_error(run("image", photos / "000000000007.png", *arguments), "results of 2 images")

    def test_several_mask_images(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        masks = [rectangle(8, 8, 32, 32), rectangle(20, 20, 30, 30), rectangle(0, 0, 0, 0)]
        masks[0][8:20, 8:20] = False  # the RoI is the box of the mask, and is filled
        files = [tmp_path / f"{name}.png" for name in "abc"]
        for path, mask in zip(files, masks, strict=True):
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
        code, _, err = run(
            "image", photos / "000000000007.png", "--masks", *files, "--output", tmp_path / "out", "--model", model_dir
        )
        assert code == 0, err
        expected = [rectangle(8, 8, 32, 32), *masks[1:]]
        for number, mask in enumerate(expected):
            with Image.open(tmp_path / "out" / f"mask_{number:03}.png") as written:
                assert np.array_equal(np.array(written), mask * 255)
        refined = json.loads((tmp_path / "out" / "refined.json").read_text())
        assert [entry["image_id"] for entry in refined] == ["000000000007"] * 3
        assert all(np.array_equal(decoded(a), b) for a, b in zip(refined, expected, strict=True))

    def test_either_predictions_or_masks(self, run: Run, photos: Path, tmp_path: Path):
        arguments = ["image", photos / "000000000007.png", "--output", tmp_path / "out"]
        assert_one_error(run(*arguments), "either --predictions or --masks, got neither")
        assert_one_error(run(*arguments, "--predictions", "a.json", "--masks", "b.png"), "got both")

    def test_a_mask_of_another_size(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        Image.new("L", (10, 10), 255).save(tmp_path / "mask.png")
        arguments = ["--masks", tmp_path / "mask.png", "--output", tmp_path / "out", "--model", model_dir]
        assert_one_error(run("image", photos / "000000000007.png", *arguments), "64 x 48 pixels, got 10 x 10")


class TestDemo:
    def test_one_photo(self, run: Run, tmp_path: Path, model_dir: Path):
        code, out, err = run("demo", "--output", tmp_path, "--model", model_dir)
        assert code == 0, err
        assert "hand-drawn outlines" in out and "boundary IoU" in out and "0.860 -> " in out
        pictures = {f"coffee_{kind}.png" for kind in ("before_after", "incoherence", "quadtree")}
        assert set(os.listdir(tmp_path)) == {"refined.json", *pictures}
        (refined,) = json.loads((tmp_path / "refined.json").read_text())
        assert set(refined) == {"image_id", "category_id", "bbox", "score", "segmentation"}

    def test_all_photos(self, run: Run, tmp_path: Path, model_dir: Path):
        code, out, err = run("demo", "--all", "--output", tmp_path, "--model", model_dir)
        assert code == 0, err
        assert out.count(" -> 0.") == 4  # two scores of each of the two photos with an outline
        assert len(json.loads((tmp_path / "refined.json").read_text())) == 3
        assert len(os.listdir(tmp_path)) == 10


class TestBenchmark:
    def test_the_bundled_photo(self, run: Run, tmp_path: Path, model_dir: Path):
        options = ("--count", 1, "--count", 5, "--seconds", 0, "--threads", 1, "--model", model_dir)
        code, out, _ = run("benchmark", *options, "--json", tmp_path / "figures.json")
        assert code == 0 and "600×400 pixels" in out and "masks a second" in out
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert {key: figures[key] for key in ("width", "height", "device", "threads")} == {
            "width": 600,
            "height": 400,
            "device": "cpu",
            "threads": 1,
        }
        assert [call["masks"] for call in figures["calls"]] == [1, 5]
        for call in figures["calls"]:
            assert len(call["times"]) == 3 and 0 < min(call["times"]) <= call["seconds"] <= max(call["times"])

    def test_a_photo_of_one_s_own(self, run: Run, photos: Path, tmp_path: Path, model_dir: Path):
        predictions = tmp_path / "dets.json"
        predictions.write_text(json.dumps([result(7, rectangle(8, 8, 32, 32), (8, 8, 24, 24))]))
        photo = photos / "000000000007.png"
        options = ("--count", 2, "--seconds", 0, "--model", model_dir)
        code, out, _ = run("benchmark", "--photo", photo, "--predictions", predictions, *options)
        assert code == 0 and "64×48 pixels" in out
        code, _, err = run("benchmark", "--photo", photo, *options)
        assert code == 2 and "got --photo alone: add --predictions" in err
        predictions.write_text("[]")
        code, _, err = run("benchmark", "--photo", photo, "--predictions", predictions, *options)
        assert code == 2 and "expected masks to refine" in err


def test_a_terminal_without_the_signs_gets_others(model_dir: Path):
    code = "from transfiner_refine.cli import main; main()"
    options = ("benchmark", "--count", "1", "--seconds", "0", "--threads", "1", "--model", str(model_dir))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "600?400 pixels" in done.stdout, done.stderr


def test_inputs_are_not_written_over(run: Run, photos: Path, tmp_path: Path, model_dir: Path):
    photo, predictions = photos / "000000000007.png", tmp_path / "dets.json"
    predictions.write_text(json.dumps([result(7, rectangle(8, 8, 32, 32), (8, 8, 24, 24))]))
    before = predictions.read_bytes()
    mask = tmp_path / "out" / "mask_000.png"
    mask.parent.mkdir()
    Image.fromarray(rectangle(8, 8, 32, 32)).save(mask)
    old_mask = mask.read_bytes()
    common = ("--images", photos, "--predictions", predictions, "--model", model_dir)
    for arguments in (
        ("image", photo, "--masks", mask, "--output", mask.parent, "--model", model_dir),
        ("coco", *common, "--output", tmp_path / "new.json", "--summary", predictions),
        ("coco", *common, "--output", tmp_path / "new.json", "--summary", tmp_path / "new.json"),
        ("evaluate", predictions, "--annotations", tmp_path / "none.json", "--json", predictions),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and "expected a file of its own for" in err
    assert predictions.read_bytes() == before and mask.read_bytes() == old_mask
    assert not (tmp_path / "new.json").exists()


def test_a_broken_entry_is_named_by_its_place_in_the_file(run: Run, photos: Path, tmp_path: Path, model_dir: Path):
    predictions = tmp_path / "dets.json"
    broken = result(7, rectangle(8, 8, 32, 32), None) | {"segmentation": {"size": [1, 1], "counts": "1"}}
    predictions.write_text(json.dumps([result(12, rectangle(8, 8, 32, 32), None), broken]))
    options = ("--output", tmp_path / "out", "--model", model_dir)
    code, _, err = run("image", photos / "000000000007.png", "--predictions", predictions, *options)
    assert code == 2 and f"{predictions}, entry 1: expected run lengths" in err
    assert not (tmp_path / "out").exists()


def test_each_option_that_shapes_masks_is_one_of_the_commands():
    names = {field.name for field in fields(RefineOptions)} - {"return_quadtree"}
    assert set(REFINE_OPTIONS) == names
    for command in ("image", "coco", "benchmark"):
        known = {parameter.name for parameter in get_command(cli.app).commands[command].params}  # pyright: ignore
        assert names <= known and "options" not in known


def test_a_wrong_option_is_not_a_traceback(run: Run):
    for arguments in (["coco"], ["image"], ["demo", "--nonsense"], ["nonsense"]):
        code, _, err = run(*arguments)
        assert code == 2
        assert "Traceback" not in err
