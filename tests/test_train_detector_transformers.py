"""Training a query model of Hugging Face transformers with its refiner by the command."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_runs import command, draw_set, metrics, options, run_in_two_processes, save_refiner
from tiny_transformers import DETRS, MASK_KINDS, Adapter, build, processor, small_adapter

from transfiner_refine import InvalidInputError, WeightsError
from transfiner_refine.adapters import transformers_models
from transfiner_refine.adapters.models import build_detector, load_refined
from transfiner_refine.adapters.training import start_refiner
from transfiner_refine.adapters.transformers_hosts import input_sizes, pixel_boxes, training_input
from transfiner_refine.data.photos import PhotoSet
from transfiner_refine.inputs import as_image, boxes_from_masks

CATEGORIES = ({"id": 3, "name": "tomato"}, {"id": 7, "name": "lime"})


def save_detector(kind: str, folder: Path) -> Path:
    """A directory as transformers writes it."""
    torch.manual_seed(0)
    model: Any = build(kind)
    model.save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return folder


def narrow_adapter(model: Any, processor: Any, channels: int = 16) -> Any:
    """Laterals of 16 channels rather than 256."""
    return Adapter(model, processor, channels=channels)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_models, "TransformersAdapter", narrow_adapter)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_photos_become_the_host_s_training_input(kind: str, tmp_path: Path):
    """Photos of two sizes; resized masks cover what the resized boxes say."""
    photos = PhotoSet.read(draw_set(tmp_path / "set"))
    first, second, empty = photos.sample(1), photos.sample(0), photos.sample(3)
    second = second._replace(image=second.image[:, :50], masks=second.masks[:, :50])
    torch.manual_seed(0)
    adapter = small_adapter(build(kind))
    refiner = start_refiner(adapter, save_refiner(tmp_path / "refiner"))
    model = adapter.with_refiner(refiner).train()
    losses = model.training_losses([first, second])
    assert losses.keys() == {"loss_detector", "loss_refine", "loss_incoherence"}
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() and value > 0 for value in losses.values())
    assert all(value.isfinite() for value in model.training_losses([empty, second]).values())
    inputs = training_input(adapter.host, adapter.processor, [first, second])
    padded, sizes = input_sizes(inputs["pixel_values"], inputs["pixel_mask"])
    masks = [label["masks"] for label in inputs["labels"]] if kind in DETRS else inputs["mask_labels"]
    for sample, of_image, (height, width) in zip((first, second), masks, sizes, strict=True):
        assert of_image.shape == (len(sample.masks), *padded)
        scale = torch.tensor([width, height, width, height]) / torch.tensor(sample.image.shape[1:]).flip(0).repeat(2)
        expected = boxes_from_masks(sample.masks) * scale
        assert (boxes_from_masks(of_image > 0) - expected).abs().max() <= 1
        assert not of_image[:, height:].any() and not of_image[:, :, width:].any()
    if kind in DETRS:
        boxes = pixel_boxes(inputs["labels"][1]["boxes"], (second.image.shape[1], second.image.shape[2]))
        torch.testing.assert_close(boxes, boxes_from_masks(second.masks))


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_the_command_trains_and_its_directory_loads(kind: str, tmp_path: Path):
    files, refiner = draw_set(tmp_path / "set"), save_refiner(tmp_path / "refiner")
    detector = f"transformers:{save_detector(kind, tmp_path / 'detector')}"
    changes = {"detector": detector, "steps": 2, "learning-rate": 1e-4}
    assert command(*options(files, refiner, tmp_path / "run", **changes)) == 0
    first, second = (load_refined(tmp_path / "run" / "best") for _ in range(2))
    assert first.adapter.categories == CATEGORIES and first.adapter.class_count == 2
    assert first.adapter.model.config.id2label == {0: "tomato", 1: "lime"}  # type: ignore[union-attr]
    photo = as_image(files.images / "1.png")
    (one,), (other,) = (model.adapter.detect([photo]) for model in (first, second))
    assert torch.equal(one.instances.masks, other.instances.masks)
    (refined,), (again,) = first.refine([one]), second.refine([other])
    assert torch.equal(refined.masks, again.masks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_two_processes_learn_what_one_learns(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """One photo of each step in either process; the photos have one object, two or none."""
    files, refiner = draw_set(tmp_path / "set"), save_refiner(tmp_path / "refiner")
    detector = f"transformers:{save_detector(kind, tmp_path / 'detector')}"
    first, second = (options(files, refiner, tmp_path / name, detector=detector) for name in ("one", "two"))
    assert command(*first) == 0
    assert run_in_two_processes(second, __file__) == [0, 0], capfd.readouterr().err
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [record["step"] for record in ours] == [0, 2, 4], "one of them writes"
    for name in ("loss", "loss_detector", "loss_refine", "gradient_norm", "score"):
        expected = [record[name] for record in theirs[1:]]
        assert [record[name] for record in ours[1:]] == pytest.approx(expected, rel=1e-4), name
    after, together = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("one", "two"))
    for name, value in after.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-4, msg=name)


def test_what_cannot_be_loaded(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"could not be loaded: .*; check the directory or Hub id"):
        build_detector(f"transformers:{tmp_path}", CATEGORIES)
    with pytest.raises(
        InvalidInputError, match=r"expected one of DetrForSegmentation, .* got RTDetrForObjectDetection"
    ):
        build_detector(f"transformers:{save_detector('rt_detr', tmp_path)}", CATEGORIES)


if __name__ == "__main__":  # one of two processes
    transformers_models.TransformersAdapter = narrow_adapter  # type: ignore[misc]
    raise SystemExit(command(*sys.argv[1:]))
