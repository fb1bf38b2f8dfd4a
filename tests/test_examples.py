"""Every file of examples/ runs as its first line says, and writes what it announces."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2_host import import_detectron2, small_config
from mmcv_ext import import_mmdet
from mmcv_ext import small_config as mmdet_config
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.functional.rle import decode, encode

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as ``python examples/NAME`` does, in a folder of its own; returns what it printed."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def disc(tmp_path: Path) -> tuple[Path, Path]:
    """A photo of a bright disc, and a mask of it that is off by three pixels."""
    y, x = np.mgrid[:120, :160]
    truth = (x - 80) ** 2 + (y - 60) ** 2 < 40**2
    photo, mask = tmp_path / "in" / "disc.jpg", tmp_path / "in" / "disc" / "object.png"
    mask.parent.mkdir(parents=True)
    Image.fromarray(np.where(truth[..., None], (220, 200, 60), (30, 60, 90)).astype(np.uint8)).save(photo)
    Image.fromarray(np.roll(truth, 3, axis=1).astype(np.uint8) * 255).save(mask)
    return photo, mask


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_refine_photo(run: Run, tmp_path: Path):
    assert "instance 0:" in run("refine_photo.py")
    (given,) = (x for x in json.loads((DEMO / "detections.json").read_text()) if x["image_id"] == 2)
    (refined,) = json.loads((tmp_path / "outputs/refine_photo/refined.json").read_text())
    assert {**refined, "segmentation": 0, "bbox": 0} == {
        **given,
        "segmentation": 0,
        "bbox": 0,
        "score": refined["score"],
    }
    assert refined["bbox"] == pytest.approx(given["bbox"], abs=1e-3)
    assert (decode(refined["segmentation"], (400, 600)) ^ decode(given["segmentation"], (400, 600))).any()
    assert picture(tmp_path / "outputs/refine_photo/before_after.png").shape[2] == 3


def test_refine_masks_only_takes_a_labelling_folder(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    photo, mask = disc
    run("refine_masks_only.py", "--photos", photo.parent, "--masks", mask.parent.parent, "--output", "refined")
    refined = picture(tmp_path / "refined" / "disc" / "object.png")
    assert refined.shape == (120, 160) and set(np.unique(refined)) == {0, 255}
    truth = picture(photo)[..., 0] > 125
    errors = [np.count_nonzero((given > 0) ^ truth) for given in (picture(mask), refined)]
    assert errors[1] < errors[0]


def test_refine_masks_only_makes_a_folder_of_the_bundled_photo(run: Run, tmp_path: Path):
    assert "cup.png" in run("refine_masks_only.py")
    assert (tmp_path / "outputs/refine_masks_only/refined/coffee/cup.png").exists()


def test_labelling_folder_keeps_names_numbers_and_palette(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    photo, mask = disc
    numbers = np.zeros((120, 160), np.uint8)
    numbers[picture(mask) > 0] = 7
    numbers[:2] = 255
    for name in ("disc", "empty"):
        label = Image.fromarray(numbers * (name == "disc"))
        label.putpalette([*range(0, 21), 200, 10, 30, *range(24, 256)] + 512 * [0])
        (tmp_path / "labels").mkdir(exist_ok=True)
        label.save(tmp_path / "labels" / f"{name}.png")
    Image.open(photo).save(photo.with_name("empty.jpg"))
    run("labelling_folder.py", "--photos", photo.parent, "--labels", tmp_path / "labels", "--output", "refined")

    truth = picture(photo)[..., 0] > 125
    refined = picture(tmp_path / "refined" / "disc.png")
    assert np.count_nonzero((refined == 7) ^ truth) < np.count_nonzero((numbers == 7) ^ truth)
    assert set(np.unique(refined)) == {0, 7, 255} and (refined[:2] == 255).all()
    assert not picture(tmp_path / "refined" / "empty.png").any()
    with Image.open(tmp_path / "refined" / "disc.png") as label:
        assert label.mode == "P" and (label.getpalette() or [])[21:24] == [200, 10, 30]


def test_labelling_folder_leaves_contested_pixels_to_the_annotator():
    refine_numbers = runpy.run_path(str(EXAMPLES / "labelling_folder.py"))["refine_numbers"]
    everywhere = SimpleNamespace(refine=lambda photo, masks: SimpleNamespace(masks=np.ones_like(masks)))
    numbers = np.array([[3, 3, 0, 9], [0, 255, 9, 9]], np.uint16)
    expected = np.array([[3, 3, 9, 9], [9, 255, 9, 9]])
    assert np.array_equal(refine_numbers(everywhere, np.zeros((2, 4, 3), np.uint8), numbers), expected)


def test_labelling_folder_makes_a_folder_of_the_bundled_photo(run: Run, tmp_path: Path):
    assert "coffee.png" in run("labelling_folder.py")
    folder = tmp_path / "outputs" / "labelling_folder"
    assert (picture(folder / "refined" / "coffee.png") != picture(folder / "labels" / "coffee.png")).any()


def test_supervision_detections(run: Run, tmp_path: Path):
    pytest.importorskip("supervision", reason="supervision is not installed: pip install supervision")
    out = run("supervision_detections.py")
    assert out.startswith("detection 0: ") and not out.startswith("detection 0: 0 ")
    assert picture(tmp_path / "outputs" / "supervision_detections.png").shape == (400, 1200, 3)


def test_refine_coco_results(run: Run, tmp_path: Path):
    out = run("refine_coco_results.py", "--batch-size", 2)
    given = json.loads((DEMO / "detections.json").read_text())
    refined = json.loads((tmp_path / "outputs/refine_coco_results/refined.json").read_text())
    assert [x["image_id"] for x in refined] == [x["image_id"] for x in given]
    changed = [a["segmentation"] != b["segmentation"] for a, b in zip(refined, given, strict=True)]
    assert sum(changed) >= 2  # the cat's refinement promises nothing, and may be refused
    assert all(name in out for name in ("astronaut.jpg", "coffee.jpg", "chelsea.jpg"))


def test_inspect_quadtree(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    out = run("inspect_quadtree.py", "--photo", disc[0], "--mask", disc[1], "--depth", 2)
    assert [line[:8] for line in out.splitlines()[:-1]] == ["level 0:", "level 1:"]
    for name in ("incoherence.png", "quadtree.png"):
        assert picture(tmp_path / "outputs/inspect_quadtree" / name).std() > 0


def test_detector_features(run: Run, disc: tuple[Path, Path]):
    out = run("detector_features.py", "--photo", disc[0], "--mask", disc[1])
    assert out.startswith("0 of ")  # untrained, the residual decoder is the identity
    assert "refuses them: expected features of 64 channels" in out


def test_torchvision_detector(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    out = run("torchvision_detector.py", "--photo", disc[0], "--untrained", "--input-side", 64)
    assert [line[:10] for line in out.splitlines()[:-1]] == ["instance 0", "instance 1", "instance 2"]
    assert picture(tmp_path / "outputs" / "torchvision_detector.png").shape[2] == 3


def test_torchvision_joint(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    photo, mask = disc
    entry = {"image_id": 1, "category_id": 7, "segmentation": encode(picture(mask)[None] > 0)[0]}
    images = [{"id": index, "file_name": photo.name, "height": 120, "width": 160} for index in (1, 2)]
    document = {"images": images, "annotations": [entry], "categories": [{"id": 7, "name": "disc"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    folder = ["--images", photo.parent, "--annotations", tmp_path / "annotations.json"]
    out = run("torchvision_joint.py", *folder, "--epochs", 1, "--input-side", 64)
    assert out.startswith("epoch 0: loss_classifier ") and ", loss_refine " in out and ", loss_incoherence " in out
    config = Refiner.from_pretrained(tmp_path / "outputs" / "torchvision_joint").config
    assert config.feature_source == "torchvision:MaskRCNN" and config.feature_fingerprint


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_detectron2_detector(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    import_detectron2()
    (tmp_path / "config.yaml").write_text(small_config().dump())
    out = run("detectron2_detector.py", "--photo", disc[0], "--config", tmp_path / "config.yaml", "--min-score", 0.0)
    assert [line[:10] for line in out.splitlines()[:-1]] == [f"instance {index}" for index in range(4)]
    assert picture(tmp_path / "outputs" / "detectron2_detector.png").shape[2] == 3


def test_mmdet_detector(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    import_mmdet()
    mmdet_config().dump(tmp_path / "config.py")
    out = run("mmdet_detector.py", "--photo", disc[0], "--config", tmp_path / "config.py")
    assert [line[:10] for line in out.splitlines()[-6:-1]] == [f"instance {index}" for index in range(5)]
    assert picture(tmp_path / "outputs" / "mmdet_detector.png").shape == (120, 320, 3)


def test_detr(run: Run, tmp_path: Path):
    pytest.importorskip("transformers", minversion="5.4", reason="transformers is not installed")
    out = run("detr.py")
    assert [line[:8] for line in out.splitlines()[:-1]] == ["query 0:", "query 1:", "query 2:"]
    assert picture(tmp_path / "outputs" / "detr.png").std() > 0


def test_mask2former(run: Run, tmp_path: Path):
    pytest.importorskip("transformers", minversion="5.4", reason="transformers is not installed")
    pytest.importorskip("scipy", reason="scipy, with which transformers matches queries, is not installed")
    out = run("mask2former.py", "--steps", 1)
    assert "step 0: loss_refine 0." in out and "instances in a map of (400, 600)" in out
    assert (tmp_path / "outputs" / "mask2former" / "laterals.safetensors").exists()


def test_every_example_is_short_and_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in source, path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name
