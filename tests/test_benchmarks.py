"""The benchmark commands, on a set that the test draws itself."""

import base64
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from transfiner_refine.evaluation import mask_iou
from transfiner_refine.functional.rle import encode

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark as ``python benchmarks/NAME.py`` would see it."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)

    return load


@pytest.fixture
def disc_set(tmp_path) -> Path:
    """One photo of a bright disc, detected as a polygon-like blob, another object that nobody detected."""
    height, width = 120, 160
    truth = np.zeros((2, height, width), bool)
    y, x = np.mgrid[:height, :width]
    truth[0] = (x - 60) ** 2 + (y - 60) ** 2 < 40**2
    truth[1, 10:30, 120:150] = True
    coarse = truth[:1].copy()
    coarse[0, :, 20:26] = False
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    photo = np.where(truth[0][..., None], (200, 60, 40), (30, 90, 160)) + noise
    folder = tmp_path / "discs"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / "images" / "disc.png")
    annotations = {
        "images": [{"id": 7, "file_name": "disc.png", "height": height, "width": width}],
        "annotations": [{"id": i, "image_id": 7, "segmentation": rle} for i, rle in enumerate(encode(truth))],
    }
    box = coarse[0, 21:100, 20:101].astype(np.uint8) * 255
    soft = cv2.resize(box, (28, 28), interpolation=cv2.INTER_AREA)
    detection = {
        "image_id": 7,
        "bbox": [20, 21, 81, 79],
        "segmentation": encode(coarse)[0],
        "soft28": base64.b64encode(soft.tobytes()).decode(),
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "detections.json").write_text(json.dumps([detection]))
    return folder


def run(module: ModuleType, *arguments: str):
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, arguments)


def test_quality_compares_the_methods(benchmark, disc_set, tmp_path):
    out = tmp_path / "figures.json"
    result = run(
        benchmark("quality"), disc_set.name, "--data", str(disc_set.parent), "--no-refiner", "--json", str(out)
    )
    assert result.exit_code == 0, result.output
    methods = json.loads(out.read_text())["methods"]
    coarse = methods["coarse"]
    assert coarse["count"] == 1  # the object without a detection does not count
    assert methods["GrabCut"]["mean_boundary_iou_refined"] > coarse["mean_boundary_iou_coarse"]
    assert methods["oracle"]["mean_boundary_iou_refined"] > methods["GrabCut"]["mean_boundary_iou_refined"]
    assert abs(methods["bilinear"]["mean_iou_refined"] - coarse["mean_iou_coarse"]) < 0.02
    assert {name for name in methods if name in result.output} == set(methods)


def test_quality_runs_the_refiner_through_its_public_interface(benchmark, disc_set):
    quality = benchmark("quality")
    (sample,) = benchmark("dataset").MatchedSet(disc_set)
    calls = []

    class Fake:
        def refine(self, image, **arguments):
            calls.append((image.shape, arguments["masks"].shape, arguments["boxes"].tolist(), arguments["mask_frame"]))
            return type("Out", (), {"masks": torch.from_numpy(sample.truth)})

    for frame, shape in ((quality.Frame.image, (1, 120, 160)), (quality.Frame.box, (1, 28, 28))):
        masks = quality.refined(Fake(), frame)(sample)
        assert mask_iou(masks, sample.truth)[0] == 1
        assert calls[-1] == ((120, 160, 3), shape, [[20, 21, 101, 100]], frame.value)


def test_the_oracle_changes_incoherent_cells_alone(benchmark, disc_set):
    quality = benchmark("quality")
    (sample,) = benchmark("dataset").MatchedSet(disc_set)
    coarse = sample.coarse.copy()
    coarse[0, 50:70, 50:70] = False  # a hole far from the true outline, where no cell is incoherent
    filled = quality.oracle(replace(sample, coarse=coarse))[0]
    changed = filled != coarse[0]
    assert changed.any()
    np.testing.assert_array_equal(filled[changed], sample.truth[0][changed])
    # A cell is at most 3 pixels wide, so neighbours of incoherent cells end within 6 of the outline.
    centre = cv2.erode(sample.truth[0].astype(np.uint8), np.ones((15, 15), np.uint8)) == 1
    assert centre[50:70, 50:70].all()
    assert not (changed & centre).any()


@pytest.mark.parametrize("missing", ["annotations.json", "detections.json"])
def test_quality_without_a_set_says_so(benchmark, disc_set, missing):
    (disc_set / missing).unlink()
    result = run(benchmark("quality"), disc_set.name, "--data", str(disc_set.parent), "--no-refiner")
    assert result.exit_code == 1
    assert f"expected {missing} in {disc_set}" in result.output
    assert "Traceback" not in result.output


def test_quality_without_a_match_says_so(benchmark, disc_set):
    (disc_set / "detections.json").write_text("[]")
    result = run(benchmark("quality"), disc_set.name, "--data", str(disc_set.parent), "--no-refiner")
    assert result.exit_code == 1
    assert "expected detections that match an object" in result.output


def test_scenes_of_any_size_begin_alike(benchmark):
    scaling = benchmark("scaling")
    few, many = scaling.make_scene(10), scaling.make_scene(60)
    assert torch.equal(few.masks, many.masks[:10])
    assert torch.equal(few.boxes, many.boxes[:10])
    assert few.image.shape == (3, 800, 1200)
    for mask, box, model in zip(many.masks, many.boxes, many.boxes[torch.arange(60) % 25], strict=True):
        y, x = mask.nonzero().T
        assert box[0] - 2 < x.min() and x.max() < box[2] + 2
        assert box[1] - 2 < y.min() and y.max() < box[3] + 2
        assert (box - model).abs().max() <= scaling.JITTER


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which only Linux has")
def test_the_peak_is_that_since_the_reset(benchmark):
    scaling = benchmark("scaling")
    size = 50_000_000
    np.ones(2 * size, np.uint8)  # an earlier, higher peak
    before = scaling.reset_peak()
    np.ones(size, np.uint8)
    assert scaling.process_memory("VmHWM") - before == pytest.approx(size, rel=0.1)
