"""The methods that a refiner is compared with, how they are judged, and the command that prints them side by side."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from benchmark_cases import make_disc_set, run

from transfiner_refine import Refiner
from transfiner_refine.errors import MissingDependencyError, WeightsError
from transfiner_refine.evaluation import boundary_iou, mask_iou
from transfiner_refine.modeling.hub import save_model


@pytest.fixture
def disc_set(tmp_path: Path) -> Path:
    return make_disc_set(tmp_path)


@pytest.fixture
def sample(benchmark, disc_set):
    """The photo of the set; a bright disc whose coarse mask misses a strip."""
    (sample,) = benchmark("dataset").MatchedSet(disc_set)
    return sample


@pytest.mark.parametrize("name", ["grabcut", "guided_filter", "dense_crf"])
class TestMethodsWithoutTraining:
    @pytest.fixture
    def method(self, benchmark, name: str):
        if name == "dense_crf":
            pytest.importorskip("pydensecrf", reason="the dense CRF needs pydensecrf2, which has to be compiled")
        return getattr(benchmark("methods"), name)

    def test_follows_the_colours(self, sample, method, name: str):
        """An outline that is off by 2 pixels everywhere comes back to where the colours change."""
        eroded = cv2.erode(sample.truth[0].astype(np.uint8), np.ones((5, 5), np.uint8))[None] == 1
        given = replace(sample, coarse=eroded)
        better = method(given)
        assert boundary_iou(better, sample.truth)[0] > boundary_iou(eroded, sample.truth)[0] + 0.2
        assert mask_iou(better, sample.truth)[0] > 0.97

    def test_leaves_its_input_and_a_photo_without_contrast(self, sample, method, name: str):
        grey = replace(sample, image=np.full_like(sample.image, 127))
        before = grey.coarse.copy()
        same = method(grey)
        np.testing.assert_array_equal(grey.coarse, before)
        assert mask_iou(same, before)[0] > 0.85

    def test_nothing_to_tell_apart(self, sample, method, name: str):
        for value in (False, True):
            flat = replace(sample, coarse=np.full_like(sample.coarse, value))
            np.testing.assert_array_equal(method(flat), flat.coarse)

    def test_no_objects(self, sample, method, name: str):
        fields = ("truth", "coarse", "boxes", "box_probs")
        empty = replace(sample, **{field: getattr(sample, field)[:0] for field in fields})
        assert method(empty).shape == (0, 120, 160)


def test_the_window_reaches_a_quarter_beyond_the_box(benchmark, sample):
    methods = benchmark("methods")
    seen = []

    def labels(rgb: np.ndarray, coarse: np.ndarray, size: float) -> np.ndarray:
        seen.append((rgb.shape, coarse.shape, size))
        return np.ones(coarse.shape, bool)

    out = methods.in_windows(sample, labels)
    # The box is 20..101 × 21..100: a quarter of 81 and of 79 more on each side, cut at the photo's left border.
    (rows, columns) = np.nonzero(out[0])
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (0, 121, 1, 119)
    assert seen == [((119, 122, 3), (119, 122), pytest.approx((81 * 79) ** 0.5))]


def test_a_guided_filter_with_a_flat_guide_is_a_mean(benchmark, sample):
    """He et al., Sec. 3.1: without contrast the slope is zero, and the output is the mean of window means."""
    methods = benchmark("methods")
    grey = replace(sample, image=np.full_like(sample.image, 90), coarse=sample.truth)
    smooth = sample.truth[0].astype(np.float32)
    side = 2 * round(methods.GUIDED_RADIUS * (81 * 79) ** 0.5) + 1
    for _ in range(2):
        smooth = cv2.blur(smooth, (side, side))
    differ = methods.guided_filter(grey)[0] != (smooth >= 0.5)
    # The photo's border is nearer to the window than two windows are wide, so only the inside is compared.
    assert not differ[20:100, 40:80].any()


def test_the_oracle_changes_incoherent_cells_alone(benchmark, sample):
    coarse = sample.coarse.copy()
    coarse[0, 50:70, 50:70] = False  # a hole far from the true outline, where no cell is incoherent
    filled = benchmark("methods").oracle(replace(sample, coarse=coarse))[0]
    changed = filled != coarse[0]
    assert changed.any()
    np.testing.assert_array_equal(filled[changed], sample.truth[0][changed])
    # A cell is at most 3 pixels wide, so neighbours of incoherent cells end within 6 of the outline.
    centre = cv2.erode(sample.truth[0].astype(np.uint8), np.ones((15, 15), np.uint8)) == 1
    assert centre[50:70, 50:70].all()
    assert not (changed & centre).any()


def test_the_refiner_is_called_through_its_public_interface(benchmark, sample):
    methods = benchmark("methods")
    calls = []

    class Fake:
        def refine(self, image, **arguments):
            calls.append((image.shape, arguments["masks"].shape, arguments["boxes"].tolist(), arguments["mask_frame"]))
            return type("Out", (), {"masks": torch.from_numpy(sample.truth)})

    for coarse, frame, shape in (("detector", "image", (1, 120, 160)), ("box", "box", (1, 28, 28))):
        masks = methods.refined(Fake(), methods.Coarse(coarse))(sample)
        assert mask_iou(masks, sample.truth)[0] == 1
        assert calls[-1] == ((120, 160, 3), shape, [[20, 21, 101, 100]], frame)


def test_kinds_of_coarse_masks(benchmark, sample):
    methods = benchmark("methods")
    assert methods.start_from(sample, methods.Coarse.detector) is sample
    box = methods.start_from(sample, methods.Coarse.box)
    np.testing.assert_array_equal(box.coarse, methods.bilinear(sample))
    assert (box.coarse != sample.coarse).any()
    truth = methods.start_from(sample, methods.Coarse.truth)
    np.testing.assert_array_equal(truth.coarse, sample.truth)
    assert truth.boxes.tolist() == [[21, 21, 100, 100]]  # the disc's own, not the detection's
    assert mask_iou(methods.bilinear(truth), sample.truth)[0] > 0.95


def test_sizes_are_those_of_coco(benchmark):
    """Small below 32², medium below 96², large from there on."""
    measure = benchmark("measure")
    result = measure.Result({}, np.array([1, 1023, 1024, 9215, 9216, 10**7]))
    counted = [result.of_size(size).tolist() for size in ("small", "medium", "large")]
    assert counted == [[True] * 2 + [False] * 4, [False] * 2 + [True] * 2 + [False] * 2, [False] * 4 + [True] * 2]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which only Linux has")
def test_memory_that_was_freed_before_counts_again(benchmark):
    measure = benchmark("measure")
    blocks, pins = 400, []

    def fill() -> None:
        # Blocks too small to be mapped one by one, and one behind them that stays: the C library keeps what was freed.
        freed = [np.ones(100_000, np.uint8) for _ in range(blocks)]
        pins.append(np.ones(100_000, np.uint8))
        freed.clear()

    fill()
    assert measure.added_memory(fill) > 0.8 * blocks * 100_000


def test_photos_of_ecssd_that_were_trained_on_are_kept_out(benchmark, disc_set):
    dataset = benchmark("dataset")
    folder = disc_set.rename(disc_set.with_name("ecssd"))
    assert len(dataset.open_set(folder.parent, "ecssd")) == 1
    assert len(dataset.open_set(folder.parent, "ecssd_validation")) == 0
    held_out = min(dataset.ECSSD_VALIDATION)
    text = (folder / "annotations.json").read_text().replace("disc.png", held_out)
    (folder / "annotations.json").write_text(text)
    assert [image["file_name"] for image in dataset.open_set(folder.parent, "ecssd_validation").images] == [held_out]


def test_peers_prints_every_kind_of_masks(benchmark, disc_set, tmp_path):
    out, copy = tmp_path / "figures.json", tmp_path / "copy"
    save_model(Refiner.from_pretrained().model, copy)
    arguments = (disc_set.name, "--data", str(disc_set.parent), "--model", f"copy={copy}", "--json", str(out))
    result = run(benchmark("peers"), *arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())["sets"]["discs"]
    for kind in ("detector", "box", "truth"):
        methods = figures[kind]
        assert {"coarse", "bilinear", "guided filter", "GrabCut", "refined", "copy", "oracle"} <= set(methods)
        assert f"discs, {kind} masks: 1 instances" in result.output
        for method, values in methods.items():
            assert method in result.output
            assert values["by_size"]["medium"]["count"] == 1 and values["by_size"]["large"]["count"] == 0
            assert method == "coarse" or values["processor_seconds_per_instance"] > 0
    refined, copied = figures["detector"]["refined"], figures["detector"]["copy"]
    assert refined["mean_iou_refined"] == copied["mean_iou_refined"] > refined["mean_iou_coarse"]
    without = figures["detector"]["refined, no segmenter"]
    assert without["mean_iou_refined"] > without["mean_iou_coarse"]
    assert figures["truth"]["coarse"]["mean_iou_coarse"] == 1
    assert figures["detector"]["coarse"]["mean_iou_coarse"] < 1


def test_methods_are_left_out_on_request(benchmark, disc_set):
    peers = benchmark("peers")
    skipped = [word for name in peers.UNTRAINED for word in ("--skip", name)]
    arguments = ("--data", str(disc_set.parent), "--coarse", "detector")
    result = run(peers, disc_set.name, *arguments, *skipped)
    assert result.exit_code == 0 and "refined" in result.output and "GrabCut" not in result.output
    result = run(peers, disc_set.name, *arguments, "--skip", "nonsense")
    assert result.exit_code == 1 and "expected methods to skip among" in result.output


def test_a_method_without_its_package_is_left_out(benchmark, disc_set, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    methods, peers = benchmark("methods"), benchmark("peers")
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    result = run(peers, disc_set.name, "--data", str(disc_set.parent), "--coarse", "detector")
    assert result.exit_code == 0 and "dense CRF is left out: pip install pydensecrf2" in result.output
    (sample,) = benchmark("dataset").MatchedSet(disc_set)
    with pytest.raises(MissingDependencyError, match="pip install pydensecrf2"):
        methods.dense_crf(sample)


def test_tuning_finds_the_best_of_a_grid(benchmark, sample, monkeypatch):
    tune = benchmark("tune_peers")
    tried = []

    def method(sample, a: int, b: int) -> np.ndarray:
        """Best at (3, 1), which lies two rounds away from the middle: by (1, 2) and (1, 1)."""
        tried.append((a, b))
        lost = {(3, 1): 0, (2, 1): 5, (1, 1): 10, (1, 2): 20}.get((a, b), 30)
        masks = sample.truth.copy()
        masks[:, :, : 25 + lost] = False
        return masks

    monkeypatch.setattr(tune.methods, "grabcut", method)
    monkeypatch.setitem(tune.GRIDS, "grabcut", {"a": (1, 2, 3), "b": (1, 2, 3)})
    console = benchmark("rich.console").Console(quiet=True)
    assert tune.tune([sample], "grabcut", console) == {"a": 3, "b": 1}
    assert len(tried) == len(set(tried))


class TestCascadePSP:
    def test_the_network_works_and_its_answer_is_the_coarse_mask(self, benchmark):
        calls = []

        class Network(torch.nn.Module):
            def forward(self, image, mask, *coarser):
                calls.append(coarser)
                return {name: torch.rand_like(mask) for name in ("pred_224", "pred_56_2", "out_224")}

        mask = torch.where(torch.rand(1, 1, 8, 8) > 0.5, 1.0, -1.0)
        out = benchmark("cascade_psp").CoarseAnswer(Network())(torch.rand(1, 3, 8, 8), mask, None, None)
        assert calls == [(None, None)]
        assert torch.equal(out["pred_224"], (mask > 0).float()) and torch.equal(out["pred_56_2"], (mask > 0).float())
        assert not torch.equal(out["out_224"], (mask > 0).float())

    def test_without_the_package(self, benchmark, monkeypatch):
        monkeypatch.setitem(sys.modules, "segmentation_refinement.main", None)
        with pytest.raises(MissingDependencyError, match="pip install segmentation-refinement"):
            benchmark("cascade_psp").cascade_psp()

    def test_without_weights(self, benchmark, tmp_path):
        pytest.importorskip("segmentation_refinement", reason="CascadePSP needs the package segmentation-refinement")
        with pytest.raises(WeightsError, match="expected CascadePSP's weights"):
            benchmark("cascade_psp").cascade_psp(tmp_path)


def test_a_further_model_needs_a_name(benchmark, disc_set):
    result = run(benchmark("peers"), disc_set.name, "--data", str(disc_set.parent), "--model", "folder")
    assert result.exit_code == 1 and "expected --model NAME=FOLDER" in result.output
