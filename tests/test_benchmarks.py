"""The benchmark commands, on a set that the test draws itself."""

import json
import mmap
import sys
from pathlib import Path

import pytest
import torch
from benchmark_cases import make_disc_set, run


@pytest.fixture
def disc_set(tmp_path: Path) -> Path:
    return make_disc_set(tmp_path)


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


def hold(size: int) -> None:
    """Hold memory for a moment: pages of its own, where an allocator would give back what it already has."""
    with mmap.mmap(-1, size) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which only Linux has")
def test_the_peak_is_that_since_the_reset(benchmark):
    scaling = benchmark("scaling")
    size = 50_000_000
    hold(2 * size)  # an earlier, higher peak
    before = scaling.reset_peak()
    hold(size)
    assert scaling.process_memory("VmHWM") - before == pytest.approx(size, rel=0.1)
