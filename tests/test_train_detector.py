"""Training a detector with its refiner by one command: what it learns, keeps, goes on with and refuses."""

import json
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_runs import (
    NAME,
    OBJECTS,
    SIZE,
    WIDTH,
    command,
    draw_set,
    maskrcnn_tiny,
    metrics,
    options,
    run_in_two_processes,
    save_refiner,
)
from safetensors.torch import save_file
from small_models import discs, small_config
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from transfiner_refine import Instances, InvalidInputError, Refiner, WeightsError
from transfiner_refine.adapters.models import build_detector, load_refined
from transfiner_refine.adapters.protocol import Prediction
from transfiner_refine.adapters.torchvision import TorchvisionAdapter
from transfiner_refine.adapters.training import DetectorTask, start_refiner, train_detector
from transfiner_refine.adapters.training_validation import DetectorValidation, coco_results
from transfiner_refine.data.annotated import DataFiles
from transfiner_refine.data.photos import FlippedPhotos, PhotoSet
from transfiner_refine.inputs import as_image, boxes_from_masks
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.schedule import JOINT_TRAINING
from transfiner_refine.training.statistics import RunningStatistics

CATEGORIES = ({"id": 3, "name": "tomato"}, {"id": 7, "name": "lime"})
DETECTOR = f"torchvision:{NAME}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataFiles:
    return draw_set(tmp_path_factory.mktemp("set") / "discs")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_refiner(tmp_path_factory.mktemp("refiner"))


@pytest.fixture(scope="module")
def output(files: DataFiles, refiner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is over. Not to be changed."""
    output = tmp_path_factory.mktemp("run") / "new"
    assert command(*options(files, refiner, output)) == 0
    return output


def photo(files: DataFiles, number: int) -> Tensor:
    return as_image(files.images / f"{number}.png").float() / 255


def checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "last.pt", weights_only=True)


def joined(refiner: Path, **choices: Any) -> Any:
    """An untrained detector with a refiner."""
    torch.manual_seed(0)
    adapter = build_detector(DETECTOR, CATEGORIES)
    return adapter.with_refiner(start_refiner(adapter, refiner), **choices)


class TestRun:
    def test_the_directory_holds_all_that_the_model_needs(self, files: DataFiles, output: Path):
        names = {"README.md", "adapter.json", "config.json", "detector.safetensors", "model.safetensors"}
        assert {path.name for path in (output / "best").iterdir()} == names
        record = json.loads((output / "best" / "adapter.json").read_text())
        assert record["categories"] == list(CATEGORIES)
        assert record["detector"] == {"name": NAME, "options": {}, "classes": 2}
        first, second = (load_refined(output / "best") for _ in range(2))
        (one,), (other,) = first([photo(files, 1)]), second([photo(files, 1)])
        assert not first.training and len(one["masks"]) > 0 and one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_the_directory_holds_the_best_averaged_weights(self, output: Path):
        """No step of so short a run finds anything, so that the start stays the best."""
        best = load_refined(output / "best")
        progress, average = checkpoint(output)["progress"], checkpoint(output)["average"]
        assert progress["best_step"] == 0 and progress["step"] == 4
        name = "detector.roi_heads.box_head.fc6.weight"
        torch.manual_seed(0)
        first = build_detector(DETECTOR, CATEGORIES).model.state_dict()[name.removeprefix("detector.")]
        assert torch.equal(best.state_dict()[name], first)
        assert not torch.equal(average[f"module.{name}"], first)

    def test_the_card(self, output: Path):
        card = (output / "best" / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transfiner-refine\n")
        for fact in ("4 photos with 4 objects", "1 photos with 1 objects", "tomato, lime", f"--detector {DETECTOR}"):
            assert fact in card, fact

    def test_figures(self, output: Path):
        records = metrics(output)
        assert [record["step"] for record in records] == [0, 2, 4]
        names = {"mask_ap", "mask_ap_coarse", "boundary_ap", "boundary_ap_coarse", "score"}
        assert all(names <= record.keys() for record in records)
        losses = {"loss_mask", "loss_classifier", "loss_objectness", "loss_refine", "loss_incoherence"}
        assert losses <= records[1].keys()
        parts = [value for name, value in records[1].items() if name.startswith("loss_")]
        assert records[1]["loss"] == pytest.approx(sum(parts))

    def test_the_same_command_goes_on_and_another_is_refused(
        self, files: DataFiles, refiner: Path, output: Path, capsys: pytest.CaptureFixture[str]
    ):
        before = (output / "last.pt").read_bytes()
        assert command(*options(files, refiner, output)) == 0
        assert (output / "last.pt").read_bytes() == before and "boundary AP" in capsys.readouterr().out
        assert command(*options(files, refiner, output, **{"train-scope": "heads"})) == 2
        assert "differs in joint.train" in capsys.readouterr().err

    def test_interrupted_and_resumed_equals_one_go(
        self, files: DataFiles, refiner: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Stopped in step 4, resumed from step 3, in the middle of an epoch."""
        seen, sample = [], PhotoSet.sample

        def stopping(self: PhotoSet, position: int) -> Any:
            seen.append(position)
            if len(seen) == 7:
                raise RuntimeError("stopped")
            return sample(self, position)

        arguments = options(files, refiner, tmp_path / "run", **{"save-every": 3, "validate-every": 4})
        with monkeypatch.context() as patch:
            patch.setattr(PhotoSet, "sample", stopping)
            with pytest.raises(RuntimeError, match="stopped"):
                command(*arguments)
        assert checkpoint(tmp_path / "run")["progress"]["step"] == 3
        assert command(*arguments) == 0
        for part in ("model", "average"):
            ours, whole = checkpoint(tmp_path / "run")[part], checkpoint(output)[part]
            assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)

    def test_a_run_starts_from_what_another_made(self, files: DataFiles, output: Path, tmp_path: Path):
        """The refiner alone is trained: the detector stays bit by bit, and is written all the same."""
        changes = {"detector": output / "best", "train-scope": "refiner", "steps": 1, "learning-rate": 1e-2}
        assert command(*options(files, None, tmp_path / "run", **changes)) == 0
        old, new = load_refined(output / "best"), load_refined(tmp_path / "run" / "best")
        assert new.adapter.fingerprint == old.adapter.fingerprint and new.adapter.categories == CATEGORIES
        trained = checkpoint(tmp_path / "run")["model"]
        for name, value in old.state_dict().items():
            assert not name.startswith("detector.") or torch.equal(trained[name], value), name
        assert any(not torch.equal(trained[name], value) for name, value in old.state_dict().items())

    @pytest.mark.slow
    def test_two_processes_learn_what_one_learns(
        self, files: DataFiles, refiner: Path, output: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        """One photo of each step in either process; running statistics of normalisation included."""
        codes = run_in_two_processes(options(files, refiner, tmp_path / "two"))
        assert codes == [0, 0], capfd.readouterr().err
        ours, theirs = metrics(tmp_path / "two"), metrics(output)
        assert [record["step"] for record in ours] == [0, 2, 4], "one of them writes"
        for name in ("loss", "loss_mask", "loss_refine", "gradient_norm", "score"):
            expected = [record[name] for record in theirs[1:]]
            assert [record[name] for record in ours[1:]] == pytest.approx(expected, rel=1e-4), name
        torch.manual_seed(0)
        before = joined(refiner).state_dict()
        after, together = checkpoint(output)["model"], checkpoint(tmp_path / "two")["model"]
        for kind in ("running_mean", "weight"):
            names = [name for name in after if name.endswith(kind)]
            moved = max(float((after[name] - before[name]).abs().max()) for name in names)
            apart = max(float((after[name] - together[name]).abs().max()) for name in names)
            assert apart < 0.02 * moved, kind


class TestTask:
    def test_the_backbone_learns_at_a_tenth_and_its_pyramid_does_not(self, refiner: Path):
        model = joined(refiner)
        task = DetectorTask(model, None, None, {})  # type: ignore[arg-type]
        groups = task.parameter_groups(JOINT_TRAINING)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        scales = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
        assert scales.keys() == dict(model.named_parameters()).keys()
        for name, scale in scales.items():
            assert scale == (0.1 if name.startswith("detector.backbone.body.") else 1.0), name

    @pytest.mark.parametrize("scope", ["refiner", "heads"])
    def test_what_is_frozen_is_not_trained(self, refiner: Path, scope: str):
        model = joined(refiner, train=scope)
        groups = DetectorTask(model, None, None, {}).parameter_groups(JOINT_TRAINING)  # type: ignore[arg-type]
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        frozen = model.detector if scope == "refiner" else model.detector.backbone
        expected = {id(p) for p in model.parameters()} - {id(p) for p in frozen.parameters()}
        assert trained == expected

    def test_losses_of_photos_with_and_without_objects(self, files: DataFiles, refiner: Path):
        """The host's target, made by hand, gives the same losses; an empty photo alone gives finite ones."""
        model, photos = joined(refiner, max_rois=4).train(), PhotoSet.read(files)
        sample = photos.sample(1)
        torch.manual_seed(3)
        found = model.training_losses([sample])
        masks = discs(*SIZE, [(24, 30, 16), (60, 34, 12)])
        target = {"boxes": boxes_from_masks(masks), "labels": torch.tensor([1, 2]), "masks": masks.byte()}
        torch.manual_seed(3)
        expected = model([photo(files, 1)], [target])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        empty = model.training_losses([photos.sample(3)])
        torch.stack(list(empty.values())).sum().backward()
        assert all(value.isfinite() for value in empty.values())

    def test_a_starting_refiner(self, refiner: Path, tmp_path: Path):
        adapter = build_detector(DETECTOR, CATEGORIES)
        assert start_refiner(adapter, None).config == adapter.config(decoder="residual")
        on_others = small_config(feature_channels=WIDTH, strides=(2, 4, 8), feature_source="mmdet:X", depth=1)
        other = save_model(RefinerModel(on_others), tmp_path / "others", torch.float32)
        found, taken = Refiner.from_pretrained(other).model, start_refiner(adapter, other).model
        assert taken.config == replace(on_others, strides=(4, 8, 16, 32), feature_source="torchvision:MaskRCNN")
        weights = taken.transfiner.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in found.transfiner.state_dict().items())
        with pytest.raises(InvalidInputError, match=r"expected a refiner on 16 channels, .* on 8: start from another"):
            start_refiner(adapter, save_model(RefinerModel(small_config(depth=1)), tmp_path / "narrow"))


class TestValidation:
    def test_perfect_masks_score_two(self, files: DataFiles, refiner: Path, monkeypatch: pytest.MonkeyPatch):
        """A detector that knows the discs, with an untrained refiner that changes nothing."""
        model, photos = joined(refiner), PhotoSet.read(files)
        model.adapter.categories = photos.categories
        given = iter(range(len(OBJECTS)))

        def detect(images: list[Tensor]) -> list[Prediction]:
            objects = OBJECTS[next(given)]
            # One disc too many, of nothing, because there may be none.
            masks = discs(*SIZE, [*((float(x), float(y), float(r)) for _, x, y, r in objects), (0, 0, -1)])[:-1]
            labels = torch.tensor([{3: 1, 7: 2}[of[0]] for of in objects], dtype=torch.int64)
            scores = torch.full((len(objects),), 0.9)
            instances = Instances(boxes_from_masks(masks), masks, SIZE, scores, labels)
            return [Prediction(instances, torch.arange(len(objects)))]

        monkeypatch.setattr(model.adapter, "detect", detect)
        monkeypatch.setattr(model, "refine", lambda predictions: [predictions[0].instances])
        record = DetectorValidation(photos, files.annotations)(model)
        assert record == {name: 1.0 for name in record if name != "score"} | {"score": 2.0}

    def test_labels_become_category_ids(self):
        adapter = build_detector(DETECTOR, CATEGORIES)
        masks = discs(*SIZE, [(24, 30, 16), (60, 34, 12), (40, 32, 24)])
        soft = torch.where(masks, 0.6, 0.4)
        instances = Instances(boxes_from_masks(masks), soft, SIZE, torch.ones(3), torch.tensor([2, 1, 9]))
        found = coco_results(adapter, instances, "a")
        assert [entry["category_id"] for entry in found] == [7, 3]
        assert found[0]["bbox"] == [8, 14, 32, 32]

    def test_photos_without_objects(self, files: DataFiles):
        empty = PhotoSet.read(files).subset([3])
        with pytest.raises(InvalidInputError, match="at least one object to validate on, got 1 photos without"):
            DetectorValidation(empty, files.annotations)


class TestPhotos:
    def test_photos_without_objects_stay_and_crowds_go(self, files: DataFiles):
        photos = PhotoSet.read(files)
        assert (len(photos), photos.count) == (5, 5) and photos.categories == CATEGORIES
        sample = photos.sample(1)
        assert sample.labels.tolist() == [0, 1]
        assert torch.equal(sample.masks, discs(*SIZE, [(24, 30, 16), (60, 34, 12)]))
        assert photos.sample(3).masks.shape == (0, *SIZE)

    def test_half_are_mirrored_with_their_masks(self, files: DataFiles):
        photos = PhotoSet.read(files)
        dataset, mirrored = FlippedPhotos(photos, seed=0), []
        for epoch in range(8):
            dataset.set_epoch(epoch)
            for index in range(len(photos)):
                plain, sample = photos.sample(index), dataset[index]
                mirrored.append(not torch.equal(plain.image, sample.image))
                if mirrored[-1]:
                    assert torch.equal(sample.image.flip(2), plain.image)
                    assert torch.equal(sample.masks.flip(2), plain.masks)
        assert 10 < sum(mirrored) < 30

    def test_the_split_shares_out_photos_with_and_without_objects(self, files: DataFiles):
        photos = PhotoSet.read(files)
        for seed in range(5):
            train, judged = photos.split(0.5, seed)
            assert train.count and judged.count
            assert sorted(train.file_names + judged.file_names) == sorted(photos.file_names)
        assert photos.subset([3, 0, 1]).spread(1).count
        with pytest.raises(InvalidInputError, match="validation share between 0 and 1"):
            photos.split(1.0, 0)
        with pytest.raises(InvalidInputError, match="at least two annotated images"):
            photos.subset([0, 3]).split(0.5, 0)

    def test_a_photo_of_another_size(self, files: DataFiles):
        photos = PhotoSet.read(files)
        photos.data.images[0] = photos.data.images[0] | {"height": 9}
        with pytest.raises(InvalidInputError, match=r"expected 0\.png of 9 x 80 pixels, as annotated, got 64 x 80"):
            photos.sample(0)


class TestDetectors:
    def trained(self, classes: int = 3) -> nn.Module:
        """A detector whose norms have counted."""
        torch.manual_seed(5)
        return maskrcnn_tiny(num_classes=classes)

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_weights_of_a_file(self, tmp_path: Path, suffix: str):
        weights = self.trained().state_dict()
        path = tmp_path / f"weights.{suffix}"
        if suffix == "pth":
            torch.save({"model": OrderedDict(weights), "epoch": 3}, path)
        else:
            save_file(weights, path)
        adapter = build_detector(f"{DETECTOR},min_size=48", CATEGORIES, str(path))
        found = adapter.model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
        assert adapter.recipe == {"name": NAME, "options": {"min_size": 48}, "classes": 2}
        assert adapter.class_count == 2 and adapter.model.transform.min_size == (48,)  # type: ignore[union-attr]

    def test_frozen_norms_stay_frozen(self, tmp_path: Path):
        weights = {name: value for name, value in self.trained().state_dict().items() if "num_batches" not in name}
        torch.save(weights, tmp_path / "weights.pth")
        adapter = build_detector(DETECTOR, CATEGORIES, str(tmp_path / "weights.pth"))
        kinds = {type(layer) for layer in adapter.backbone.modules()}
        assert FrozenBatchNorm2d in kinds and nn.BatchNorm2d not in kinds
        assert adapter.model.state_dict().keys() == weights.keys()

    def test_class_layers_of_other_classes_become_new_ones(self, tmp_path: Path):
        weights = self.trained(9).state_dict()
        torch.save(weights, tmp_path / "weights.pth")
        for source in ("DEFAULT", str(tmp_path / "weights.pth")):
            adapter = build_detector(DETECTOR, CATEGORIES, source)
            assert adapter.class_count == 2 and isinstance(adapter, TorchvisionAdapter)
            assert adapter.mask_predictor.mask_fcn_logits.out_channels == 3  # type: ignore[union-attr]
            (output,) = adapter.model.eval()([torch.rand(3, *SIZE)])
            assert output["labels"].max() <= 2
        name = "backbone.body.0.0.weight"
        assert torch.equal(adapter.model.state_dict()[name], weights[name])

    @pytest.mark.parametrize(
        ("name", "weights", "message"),
        [
            ("torchvision:maskrcnn_none", None, "expected a Mask R-CNN of torchvision, .*maskrcnn_resnet50_fpn_v2"),
            ("torchvision:fasterrcnn_resnet50_fpn", None, "expected a Mask R-CNN of torchvision"),
            ("torchvision:", None, "expected a detector as torchvision:NAME"),
            ("yolo", None, "expected a detector as torchvision:NAME"),
            (f"{DETECTOR},min_sise=3", None, "expected options of torchvision's maskrcnn_tiny, got 'min_sise'"),
            (f"{DETECTOR},min_size", None, "expected an option as key=value, got 'min_size'"),
            (f"{DETECTOR},min_size=abc", None, "expected a number for min_size of torchvision's .*, got 'abc'"),
            (f"{DETECTOR},box_score_thresh=null", None, "expected a number for box_score_thresh of .*, got None"),
            (f"{DETECTOR},rpn_pre_nms_top_n_test=true", None, "expected a number for rpn_pre_nms.*, got True"),
            ("detectron2:X", None, "Detectron2 trains .* its own trainer, see docs/adapters/detectron2.md"),
            ("mmdet:X", None, "MMDetection trains .* its own trainer, see docs/adapters/mmdet.md"),
            ("transformers:x/y", "DEFAULT", "expected no weights beside 'transformers:x/y'"),
        ],
    )
    def test_names(self, name: str, weights: str | None, message: str):
        with pytest.raises(InvalidInputError, match=message):
            build_detector(name, CATEGORIES, weights)

    def test_weights_that_do_not_fit(self, tmp_path: Path):
        path = tmp_path / "weights.pth"
        for content, message in (
            ({"a": torch.zeros(1)}, "does not fit torchvision's maskrcnn_tiny: .* the first is"),
            ([1], "expected a state dict in .*, got list"),
            (nn.Linear(1, 1), "expected a state dict in .* of tensors alone, got:"),
        ):
            torch.save(content, path)
            with pytest.raises(WeightsError, match=message):
                build_detector(DETECTOR, CATEGORIES, str(path))
        path.write_bytes(b"no")
        for name in (path, tmp_path / "gone.pth", tmp_path / "gone.safetensors"):
            with pytest.raises(WeightsError, match=r"expected a (state dict in|file of weights, got)"):
                build_detector(DETECTOR, CATEGORIES, str(name))

    def test_directories_that_cannot_be_loaded(self, refiner: Path, tmp_path: Path):
        with pytest.raises(WeightsError, match=r"adapter.json in .* missing"):
            load_refined(refiner)
        adapter = TorchvisionAdapter(self.trained())
        adapter.with_refiner(start_refiner(adapter, refiner)).save_pretrained(tmp_path)
        with pytest.raises(InvalidInputError, match=r"to say how the detector is built, got none: .*with_refiner\('"):
            load_refined(tmp_path)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"detector": None, "max-rois": 3}, "expected --max-rois only with --detector"),
            ({"predictions": "x.json", "min-area": 3}, "expected --predictions, --min-area only without --detector"),
            ({"frozen-stages": 3}, "expected --frozen-stages only without --detector"),
            ({"detector": "detectron2:X"}, "its own trainer, see docs/adapters/detectron2.md"),
            ({"batch-size": 3, "micro-batch": 2}, "batch_size as a multiple of micro_batch"),
        ],
    )
    def test_options_that_do_not_go_together(
        self, files: DataFiles, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes, message: str
    ):
        assert command(*options(files, refiner, tmp_path / "run", **changes)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
        assert not (tmp_path / "run" / "run.json").exists()

    def test_a_directory_brings_its_own_refiner(
        self, files: DataFiles, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        assert command(*options(files, refiner, tmp_path / "run", detector=refiner)) == 2
        assert "expected no --model beside" in capsys.readouterr().err

    def test_models_that_cannot_be_trained_here(
        self, files: DataFiles, refiner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        model = joined(refiner)
        monkeypatch.setattr(TorchvisionAdapter, "trainer", "a Runner")
        with pytest.raises(InvalidInputError, match=r"got 'torchvision:MaskRCNN': train the model .* by a Runner"):
            train_detector(model, files, tmp_path)
        monkeypatch.undo()
        adapter = model.adapter
        with pytest.raises(InvalidInputError, match="features, got one with an image encoder"):
            train_detector(adapter.with_refiner(Refiner.from_pretrained()), files, tmp_path)
        three = build_detector(DETECTOR, [*CATEGORIES, {"id": 9, "name": "plum"}])
        three.categories = None
        with pytest.raises(InvalidInputError, match=r"the 2 categories of .*, got one of 3 classes"):
            train_detector(three.with_refiner(start_refiner(three, refiner)), files, tmp_path)
        adapter.categories = CATEGORIES[:1]
        with pytest.raises(InvalidInputError, match=r"expected categories of the detector, \[3\], in .*, got \[7\]"):
            train_detector(adapter.with_refiner(start_refiner(adapter, refiner)), files, tmp_path)


def test_running_statistics_move_once_a_step():
    """By the mean over its micro-batches, whoever saw them; a layer in evaluation mode keeps its own."""
    trained, kept = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()
    model = nn.Sequential(trained, kept)
    batches = torch.from_numpy(np.random.default_rng(0).normal(2, 1, (2, 8, 3)).astype(np.float32))
    statistics = RunningStatistics(model)
    statistics.begin()
    for batch in batches:
        model(batch)
        statistics.collect()
    assert trained.running_mean is not None and trained.running_var is not None and kept.running_mean is not None
    assert trained.running_mean.abs().max() == 0
    statistics.apply(2, lambda values: values)
    torch.testing.assert_close(trained.running_mean, 0.1 * batches.mean(dim=(0, 1)))
    torch.testing.assert_close(trained.running_var, 0.9 + 0.1 * batches.var(dim=1).mean(dim=0))
    assert kept.running_mean.abs().max() == 0
