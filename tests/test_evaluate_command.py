"""``transfiner-refine evaluate`` and the benchmark of the incoherence detector: what they print and write."""

import base64
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import typer
from evaluate_cases import coco_set, lvis_set
from PIL import Image
from typer.testing import CliRunner

from transfiner_refine import cli
from transfiner_refine.config import TransfinerConfig
from transfiner_refine.evaluation import analyse_incoherence, average_precision, load_ground_truth, load_lvis
from transfiner_refine.functional.rle import decode, encode
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner

REPOSITORY = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]


def write(folder: Path, value: Any, name: str) -> Path:
    path = folder / name
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run ``evaluate``; returns the exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["transfiner-refine", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return call


class Files:
    """A set with results before and after, the latter nearer to the truth."""

    def __init__(self, folder: Path):
        annotations, results = coco_set(0)
        sizes = {x["id"]: (x["height"], x["width"]) for x in annotations["images"]}
        better = []
        for entry in results:
            mask = decode(entry["segmentation"], sizes[entry["image_id"]])
            true = [
                decode(x["segmentation"], mask.shape)
                for x in annotations["annotations"]
                if x["image_id"] == entry["image_id"]
            ]
            best = max(true, key=lambda x: (x & mask).sum() / (x | mask).sum())
            better.append({**entry, "segmentation": encode((mask | best)[None])[0]})
        self.annotations = write(folder, annotations, "annotations.json")
        self.lvis = write(folder, lvis_set(annotations, 0), "lvis.json")
        self.before = write(folder, results, "coarse.json")
        self.after = write(folder, better, "refined.json")
        self.results = {self.before: results, self.after: better}
        self.output = folder / "out" / "figures.json"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    pytest.importorskip("faster_coco_eval", reason="average precision needs the extra eval")
    return Files(tmp_path)


def row(out: str, heading: str) -> list[str]:
    """Cells of the row of a table that begins with the heading."""
    cells = ([cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in out.splitlines())
    (found,) = (line for line in cells if line[0] == heading)
    return found[1:]


def test_before_and_after_side_by_side(run: Run, files: Files):
    code, out, err = run(files.before, files.after, "--annotations", files.annotations)
    assert code == 0, err
    truth = load_ground_truth(files.annotations)
    assert row(out, "points, of 100") == ["coarse.json", "refined.json", "difference"]
    before, after = (average_precision(truth, results) for results in files.results.values())
    assert row(out, "mask AP") == [
        f"{100 * before.ap:.2f}",
        f"{100 * after.ap:.2f}",
        f"{100 * (after.ap - before.ap):+.2f}",
    ]
    assert row(out, "AP75")[0] == f"{100 * before.ap75:.2f}"
    before, after = (average_precision(truth, results, "boundary") for results in files.results.values())
    assert row(out, "boundary AP") == [
        f"{100 * before.ap:.2f}",
        f"{100 * after.ap:.2f}",
        f"{100 * (after.ap - before.ap):+.2f}",
    ]
    assert after.ap > before.ap
    assert "AP*" not in out and "incoherent" not in out
    assert "6 images, 35 objects" in out


def test_everything_in_json(run: Run, files: Files):
    arguments = [files.before, files.after, "--annotations", files.annotations, "--lvis", files.lvis, "--incoherence"]
    code, out, err = run(*arguments, "--dilation", 0.01, "--json", files.output)
    assert code == 0, err
    document = json.loads(files.output.read_text())
    assert document["images"] == 6 and document["dilation"] == 0.01 and not document["class_agnostic"]
    truth = load_ground_truth(files.annotations)
    federated = load_lvis(files.lvis, truth)

    def figures(*arguments: Any) -> dict[str, float | None]:
        return {key: None if value != value else value for key, value in asdict(average_precision(*arguments)).items()}

    for written, (path, results) in zip(document["results"], files.results.items(), strict=True):
        assert written["file"] == str(path) and written["count"] == len(results)
        assert written["mask"] == figures(truth, results)
        assert written["boundary"] == figures(truth, results, "boundary", 0.01)
        assert written["lvis_mask"] == figures(federated, results)
        assert written["lvis_boundary"] == figures(federated, results, "boundary", 0.01)
        analysis = analyse_incoherence(truth, results)
        assert written["incoherence"]["count"] == analysis.count
        assert written["incoherence"]["union"] == asdict(analysis.union)
        assert written["incoherence"]["levels"] == [asdict(region) for region in analysis.levels]
        assert written["incoherence"]["filled"]["boundary"] == figures(truth, analysis.filled, "boundary", 0.01)
    first = document["results"][0]
    assert row(out, "AP*")[0] == f"{100 * first['lvis_mask']['ap']:.2f}"
    assert out.count("All regions filled with ground truth") == 2
    filled = first["incoherence"]["filled"]["mask"]["ap"]
    assert f"mask AP {100 * first['mask']['ap']:.2f} to {100 * filled:.2f}" in out
    assert filled > first["mask"]["ap"]


def test_part_of_the_images_regardless_of_category(run: Run, files: Files, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("12.jpg\n3.jpg\n\n")
    arguments = [files.before, "--annotations", files.annotations, "--only", names, "--class-agnostic"]
    code, out, err = run(*arguments, "--json", files.output)
    assert code == 0, err
    assert row(out, "APl") == ["-"]  # these images are too small for a large object
    truth = load_ground_truth(files.annotations, ["12.jpg", "3.jpg"]).regardless_of_category()
    document = json.loads(files.output.read_text())
    assert document["images"] == 2 and document["results"][0]["mask"]["large"] is None
    assert document["results"][0]["mask"]["ap"] == average_precision(truth, files.results[files.before]).ap


def test_a_background_photo_alone(run: Run, files: Files, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("18.jpg\n")  # without an object
    found = {**files.results[files.before][0], "image_id": 18, "segmentation": encode(np.ones((1, 40, 40), bool))[0]}
    files.before.write_text(json.dumps([found]))
    for extra in ([], ["--class-agnostic"]):
        code, out, err = run(files.before, "--annotations", files.annotations, "--only", names, *extra)
        assert code == 0, err
        assert row(out, "mask AP") == row(out, "boundary AP") == ["-"]


def test_a_file_without_a_matching_detection_is_reported_without_the_analysis(run: Run, files: Files):
    files.after.write_text("[]")
    arguments = [files.before, files.after, "--annotations", files.annotations, "--incoherence"]
    code, out, err = run(*arguments, "--json", files.output)
    assert code == 0, err
    assert row(out, "mask AP")[1] == "0.00"
    assert out.count("All regions filled with ground truth") == 1
    assert "no incoherence analysis of refined.json: expected detections whose box overlaps" in out
    first, second = json.loads(files.output.read_text())["results"]
    assert first["incoherence"]["count"] > 0
    assert second["incoherence"] is None and second["mask"]["ap"] == 0
    assert run(files.before, "--annotations", files.annotations, "--json", files.output)[0] == 0
    (plain,) = json.loads(files.output.read_text())["results"]
    assert "incoherence" not in plain, "null means that there was nothing to analyse, not that nobody asked"


def test_a_terminal_that_cannot_print_a_table_does_not_lose_the_work(files: Files, monkeypatch: pytest.MonkeyPatch):
    arguments = ["evaluate", files.before, "--annotations", files.annotations, "--incoherence", "--json", files.output]
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner(charset="ascii").invoke(cli.app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UnicodeEncodeError)
    assert json.loads(files.output.read_text())["results"][0]["incoherence"]["count"] > 0


def test_files_of_one_name_are_told_apart(run: Run, files: Files, tmp_path: Path):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "coarse.json"
    other.write_text(files.before.read_text())
    _, out, _ = run(files.before, other, "--annotations", files.annotations)
    assert str(tmp_path / "b") in out.replace("\n", "")


def test_a_broken_second_file_ends_before_the_first_is_measured(run: Run, files: Files):
    broken = [{**files.results[files.after][0], "score": None}]
    files.after.write_text(json.dumps(broken))
    files.output.parent.mkdir()
    files.output.write_text("old")
    code, out, err = run(files.before, files.after, "--annotations", files.annotations, "--json", files.output)
    assert code == 2 and out == ""
    assert err.startswith(f"error: {files.after}: entry 0: expected a score") and err.count("\n") == 1
    assert files.output.read_text() == "old"


def test_wrong_arguments_are_one_line(run: Run, files: Files, tmp_path: Path):
    common = [files.before, "--annotations", files.annotations]
    for arguments, message in (
        ([files.before, "--annotations", tmp_path / "none.json"], "No such file"),
        ([files.before, "--annotations", files.before], "expected a COCO annotations file"),
        ([files.annotations, "--annotations", files.annotations], "that is an annotations file"),
        ([*common, "--lvis", files.annotations], "give LVIS annotations, not COCO's"),
        ([*common, "--lvis", files.lvis, "--class-agnostic"], "expected categories with LVIS annotations"),
        ([*common, "--only", tmp_path / "none.txt"], "expected a text file of image file names"),
        ([*common, "--json", tmp_path], "got the folder"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The detector benchmark, which finds its neighbour ``dataset.py`` as it does when it is run as a script."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    spec = importlib.util.spec_from_file_location("detector", REPOSITORY / "benchmarks" / "detector.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photos of a disc, and a detector's mask of each that misses a strip."""
    y, x = np.mgrid[:120, :160]
    truth = (x - 60) ** 2 + (y - 60) ** 2 < 40**2
    coarse = truth & (x > 25)
    folder = tmp_path / "discs"
    (folder / "images").mkdir(parents=True)
    images, annotations, detections = [], [], []
    soft = cv2.resize(coarse[21:100, 20:101].astype(np.uint8) * 255, (28, 28), interpolation=cv2.INTER_AREA)
    for i in (1, 2):
        name = f"{i}.png"
        Image.fromarray(np.where(truth[..., None], (200, 60, 40), (30, 90, 160)).astype(np.uint8)).save(
            folder / "images" / name
        )
        images.append({"id": i, "file_name": name, "height": 120, "width": 160})
        annotations.append({"id": i, "image_id": i, "segmentation": encode(truth[None])[0]})
        detections.append(
            {
                "image_id": i,
                "bbox": [20, 21, 81, 79],
                "segmentation": encode(coarse[None])[0],
                "soft28": base64.b64encode(soft.tobytes()).decode(),
            }
        )
    write(folder, {"images": images, "annotations": annotations}, "annotations.json")
    write(folder, detections, "detections.json")
    return folder


def model(folder: Path, guidance: bool, finds: bool) -> Path:
    """A small refiner that finds every cell incoherent, or none."""
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
        lower_level_guidance=guidance,
    )
    made = RefinerModel(config)
    with torch.no_grad():
        detector = made.transfiner.incoherence_detector
        for classifier in (detector.classifier, *detector.finer_classifier):
            classifier.weight.zero_()  # type: ignore[operator]
            classifier.bias.fill_(5 if finds else -5)  # type: ignore[operator]
    return Refiner(made).save_pretrained(folder)


def test_the_detector_benchmark_compares_models(benchmark: ModuleType, photos: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    everything, nothing = model(tmp_path / "all", True, True), model(tmp_path / "none", False, False)
    app = typer.Typer()
    app.command()(benchmark.main)
    only = tmp_path / "only.txt"
    only.write_text("2.png\n")
    arguments = [photos.name, "--data", photos.parent, "--model", everything, "--model", nothing]
    for extra, count in (([], 2), (["--only", only], 1), (["--limit", 1], 1)):
        done = CliRunner().invoke(app, [str(x) for x in [*arguments, *extra, "--json", tmp_path / "figures.json"]])
        assert done.exit_code == 0, done.output
        assert f"{count} instances of {count} photos" in done.output
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["instances"] == count
    found, missed = figures["models"].values()
    assert found["lower_level_guidance"] and not missed["lower_level_guidance"]
    assert "with guidance" in done.output and "without guidance" in done.output
    for level, counts in enumerate(found["levels"]):
        assert counts["cells"] == counts["judged"] == counts["found"] == (28 << level) ** 2
        assert counts["recall"] == 1
        assert counts["accuracy"] == counts["precision"] == counts["incoherent"] / counts["cells"]
        assert 0.02 < counts["precision"] < 0.2  # an outline among the cells
    assert [counts["recall"] for counts in missed["levels"]] == [0, 0]
    assert missed["levels"][1]["judged"] == 0
    assert row(done.output, "28×28")[1:] == [f"{found['levels'][0]['precision']:.1%}"] * 2


def test_the_detector_benchmark_without_its_data_says_so(benchmark: ModuleType, tmp_path: Path):
    app = typer.Typer()
    app.command()(benchmark.main)
    done = CliRunner().invoke(app, ["none", "--data", str(tmp_path)])
    assert done.exit_code == 1
    assert "expected annotations.json in" in done.output and "Traceback" not in done.output
