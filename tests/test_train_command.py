"""Fine-tuning on a data set that the test draws: one command makes a refiner, and says plainly what it cannot use."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import encoder_config, eventful_model, small_config

from transfiner_refine import InvalidInputError, MissingDependencyError, Refiner, cli
from transfiner_refine.data.annotated import AnnotatedSet, DataFiles
from transfiner_refine.evaluation import boundary_iou, mask_iou
from transfiner_refine.evaluation.detector import DetectorCounts
from transfiner_refine.functional.rle import encode
from transfiner_refine.modeling.gain import STATISTICS
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.calibration import fit_gain
from transfiner_refine.training.schedule import FINE_TUNING, TrainConfig, fit_batch
from transfiner_refine.training.validation import Validation, _predicted_gains, matched_image, simulated_image

IMAGES = 6
SIZE = (90, 110)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfiner_refine.training.metrics.draw_metrics", lambda records: b"")


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def draw_set(folder: Path) -> DataFiles:
    """Six photos of a bright disc, a crowd on each, and a detector that finds a disc beside it on all but the first."""
    (folder / "photos").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations, predictions = [], [], []
    for number in range(IMAGES):
        x, y, radius = 50 + 2 * number, 45, 25 + number
        truth, found = disc(x, y, radius), disc(x + 4, y, radius)
        photo = np.where(truth[..., None], (200, 60, 40), (30, 90, 160)) + rng.normal(0, 8, (*SIZE, 3))
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / "photos" / f"{number}.png")
        images.append({"id": f"photo {number}", "file_name": f"{number}.png"})
        entry = {"image_id": f"photo {number}", "category_id": 1}
        annotations.append({"id": 2 * number, **entry, "segmentation": encode(truth[None])[0]})
        annotations.append({"id": 2 * number + 1, **entry, "iscrowd": 1, "segmentation": encode(~truth[None])[0]})
        if number:
            predictions.append({**entry, "score": 0.9, "segmentation": encode(found[None])[0]})
    files = DataFiles(folder / "photos", folder / "annotations.json", folder / "predictions.json")
    files.annotations.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert files.predictions is not None
    files.predictions.write_text(json.dumps(predictions))
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataFiles:
    return draw_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small refiner with an image encoder, untrained."""
    torch.manual_seed(0)
    return save_model(RefinerModel(encoder_config(depth=1)), tmp_path_factory.mktemp("model"))


def command(*arguments: object) -> int:
    """Run ``transfiner-refine train``; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["transfiner-refine", "train", *map(str, arguments)])
        cli.main()
    return end.value.code or 0  # type: ignore[return-value]


def options(files: DataFiles, output: Path, **changes: object) -> list[object]:
    """Options of a run of four short steps."""
    values = {"images": files.images, "annotations": files.annotations, "output": output, "steps": 4}
    values |= {"batch-size": 2, "micro-batch": 2, "validate-every": 2, "workers": 0, "precision": "no"} | changes
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def output(files: DataFiles, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is over. Not to be changed."""
    output = tmp_path_factory.mktemp("run") / "new"
    assert command(*options(files, output, predictions=files.predictions, model=model)) == 0
    return output


class TestCommand:
    def test_the_refiner_is_ready_for_use_and_for_the_hub(self, output: Path):
        assert {path.name for path in (output / "best").iterdir()} == {"config.json", "model.safetensors", "README.md"}
        refiner = Refiner.from_pretrained(output / "best")
        assert len(refiner.refine(np.zeros((*SIZE, 3), np.uint8), masks=disc(50, 45, 20)[None])) == 1
        card = (output / "best" / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transfiner-refine\n")
        for fact in ("5 objects of 5 photos with the masks of a detector", "1 objects of 1 photos", "of 4 steps of 2"):
            assert fact in card, fact
        assert f"--output {output} --steps 4 --batch-size 2" in card

    def test_figures_of_every_validation(self, output: Path):
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [0, 2, 4]
        names = {"iou", "iou_coarse", "boundary_iou", "boundary_iou_coarse", "worse", "score"}
        assert all(names | {"recall_0", "accuracy_0", "nodes_0"} <= record.keys() for record in records)
        assert all(record["iou_coarse"] == records[0]["iou_coarse"] < 1 for record in records)

    def test_the_same_command_goes_on_and_another_is_refused(
        self, files: DataFiles, model: Path, output: Path, capsys: pytest.CaptureFixture[str]
    ):
        same = {"predictions": files.predictions, "model": model}
        before = (output / "last.pt").read_bytes()
        assert command(*options(files, output, **same)) == 0
        assert (output / "last.pt").read_bytes() == before and "4 steps" in capsys.readouterr().out
        assert command(*options(files, output, **(same | {"learning-rate": 1.0}))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "differs in train.learning_rate" in line
        assert command(*options(files, output, **(same | {"predictions": None}))) == 2

    def test_without_predictions_and_with_validation_files(self, files: DataFiles, model: Path, tmp_path: Path):
        other = draw_set(tmp_path / "other")
        judged = {"validation-images": other.images, "validation-annotations": other.annotations}
        assert command(*options(files, tmp_path / "run", steps=1, model=model, **judged)) == 0
        card = (tmp_path / "run" / "best" / "README.md").read_text()
        assert "6 objects of 6 photos, else with simulated" in card
        assert "6 objects of 6 photos, coarse masks simulated" in card

    def test_runs_that_share_a_cache_keep_their_own_photos(self, files: DataFiles, model: Path, tmp_path: Path):
        shared = {"cache": tmp_path / "cache", "model": model, "steps": 1}
        for seed in (0, 1, 0):
            assert command(*options(files, tmp_path / f"run {seed}", seed=seed, **shared)) == 0
        names = [
            {image["file_name"] for image in json.loads(path.read_text())["images"]}
            for path in (tmp_path / "cache").glob("train-*/annotations.json")
        ]
        assert len(names) == 2 and names[0] != names[1]

    def test_the_embedded_refiner_is_the_start(self, files: DataFiles, tmp_path: Path):
        assert command(*options(files, tmp_path, steps=1, predictions=files.predictions)) == 0
        assert Refiner.from_pretrained(tmp_path / "best").config == Refiner.from_pretrained().config


class TestErrors:
    def failure(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        assert command(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def rewrite(self, files: DataFiles, folder: Path, **changes: object) -> DataFiles:
        """The same data set with other annotations."""
        document = json.loads(files.annotations.read_text()) | changes
        path = folder / "annotations.json"
        path.write_text(json.dumps(document))
        return replace(files, annotations=path)

    @pytest.mark.parametrize(
        ("kept", "message"),
        [
            (lambda entry: False, "expected annotated objects in .*, got none"),
            (lambda entry: entry.get("iscrowd"), "expected annotated objects in .*, got none"),
            (lambda entry: entry["id"] == 0, "at least two annotated images to set some apart, got 1"),
        ],
    )
    def test_too_few_objects(self, files: DataFiles, model: Path, tmp_path: Path, capsys, kept, message: str):
        entries = [entry for entry in json.loads(files.annotations.read_text())["annotations"] if kept(entry)]
        few = self.rewrite(files, tmp_path, annotations=entries)
        line = self.failure(capsys, *options(few, tmp_path / "run", model=model))
        assert re.search(message, line), line

    def test_only_small_objects(self, files: DataFiles, model: Path, tmp_path: Path, capsys):
        line = self.failure(capsys, *options(files, tmp_path / "run", model=model, **{"min-area": 9000}))
        assert "expected at least one object, got none" in line and "lower min_area" in line

    def test_a_refiner_that_needs_a_detector(self, files: DataFiles, tmp_path: Path, capsys):
        save_model(RefinerModel(small_config(feature_source="torchvision:MaskRCNN")), tmp_path / "model")
        line = self.failure(capsys, *options(files, tmp_path / "run", model=tmp_path / "model"))
        assert "expected a refiner with an image encoder, got one for the features of 'torchvision:MaskRCNN'" in line

    def test_predictions_of_other_images(self, files: DataFiles, model: Path, tmp_path: Path, capsys):
        (tmp_path / "dets.json").write_text(json.dumps([{"image_id": 7, "segmentation": [[0, 0, 9, 0, 9, 9]]}]))
        line = self.failure(capsys, *options(files, tmp_path / "run", model=model, predictions=tmp_path / "dets.json"))
        assert "expected predictions for the annotated images" in line and "'photo 0'" in line

    def test_missing_photos(self, files: DataFiles, model: Path, tmp_path: Path, capsys):
        images = json.loads(files.annotations.read_text())["images"]
        images[0]["file_name"] = "gone.png"
        line = self.failure(
            capsys, *options(self.rewrite(files, tmp_path, images=images), tmp_path / "run", model=model)
        )
        assert "got 1 missing, 'gone.png' the first" in line

    def test_broken_annotations_are_found_by_their_place(self, files: DataFiles, tmp_path: Path):
        entries = json.loads(files.annotations.read_text())["annotations"]
        entries[8]["segmentation"] = {"size": [9, 9], "counts": [81]}
        broken = self.rewrite(files, tmp_path, annotations=entries)
        place = rf"{re.escape(str(broken.annotations))}, entry 8, 4\.png: expected run lengths of size \[90, 110\]"
        with pytest.raises(InvalidInputError, match=place):
            AnnotatedSet.read(broken)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"segmentation": {"size": list(SIZE), "counts": "zz~"}}, "expected counts compressed as in COCO"),
            ({"soft28": "abc"}, "expected soft28 as base64 of 28x28 bytes, got 'abc'"),
            ({"soft28": 5}, "expected soft28 as base64 of 28x28 bytes, got 5"),
            ({"soft28": "AAAA"}, "expected soft28 as base64 of 28x28 bytes, got 3 bytes"),
        ],
    )
    def test_broken_predictions_are_found_by_their_place(
        self, files: DataFiles, model: Path, tmp_path: Path, capsys, changes: dict[str, object], message: str
    ):
        assert files.predictions is not None
        results = json.loads(files.predictions.read_text())
        results[3] |= changes
        path = tmp_path / "dets.json"
        # One of no annotated photo goes before: it is dropped, and the others' places move.
        path.write_text(json.dumps([{"image_id": "other", "segmentation": []}, *results]))
        line = self.failure(capsys, *options(files, tmp_path / "run", model=model, predictions=path))
        assert f"{path}, entry 4, 4.png: {message}" in line

    def test_a_damaged_photo(self, files: DataFiles, tmp_path: Path):
        shutil.copytree(files.images, tmp_path / "photos")
        (tmp_path / "photos" / "2.png").write_bytes(b"damaged")
        with pytest.raises(InvalidInputError, match=r"expected a readable image, got .*2\.png"):
            AnnotatedSet.read(replace(files, images=tmp_path / "photos"))

    def test_half_of_the_validation_files(self, files: DataFiles, tmp_path: Path, capsys):
        for name in ("validation-images", "validation-predictions"):
            line = self.failure(capsys, *options(files, tmp_path / "run", **{name: files.images}))
            assert "--validation-images and --validation-annotations" in line

    def test_training_without_its_packages(self, uninstall: Callable[..., None]):
        uninstall("accelerate", "transfiner_refine.training")
        with pytest.raises(MissingDependencyError, match=r'pip install "transfiner-refine\[train\]"'):
            import transfiner_refine.training.finetune  # noqa: F401


class TestData:
    def test_the_split_is_by_image_seeded_and_never_mixed(self, files: DataFiles):
        whole = AnnotatedSet.read(files)
        assert len(whole) == whole.count == IMAGES  # crowds are left out
        train, judged = whole.split(0.34, seed=1)
        assert len(judged) == 2 and train.paths.keys() | judged.paths.keys() == whole.paths.keys()
        assert not train.paths.keys() & judged.paths.keys() and not train.predictions.keys() & judged.paths.keys()
        assert judged.paths == whole.split(0.34, seed=1)[1].paths
        assert len({tuple(whole.split(0.34, seed)[1].paths) for seed in range(9)}) > 3
        for share in (0.01, 0.99):
            assert all(len(part) for part in whole.split(share, 0))
        for share in (0.0, 1.0, float("nan")):
            with pytest.raises(InvalidInputError, match="validation share between 0 and 1"):
                whole.split(share, 0)

    def test_annotations_without_a_segmentation_are_left_out(self, files: DataFiles, tmp_path: Path):
        document = json.loads(files.annotations.read_text())
        box = {"image_id": "photo 0", "bbox": [1, 2, 3, 4]}
        document["annotations"] += [box, {**box, "segmentation": None}, {**box, "segmentation": []}]
        (tmp_path / "annotations.json").write_text(json.dumps(document))
        boxed = replace(files, annotations=tmp_path / "annotations.json")
        assert AnnotatedSet.read(boxed).objects == AnnotatedSet.read(files).objects
        document["annotations"] += [{"bbox": [1, 2, 3, 4]}]
        boxed.annotations.write_text(json.dumps(document))
        with pytest.raises(InvalidInputError, match='entry 15: expected "image_id"'):
            AnnotatedSet.read(boxed)

    def test_a_few_photos_are_spread_over_the_set(self, files: DataFiles):
        whole = AnnotatedSet.read(files)
        assert list(whole.spread(3).paths) == ["photo 0", "photo 2", "photo 5"] and whole.spread(6) is whole

    def test_the_fingerprint_tells_files_of_one_name_apart(self, files: DataFiles, tmp_path: Path):
        assert files.predictions is not None
        places = tmp_path / "truth" / "data.json", tmp_path / "found" / "data.json"
        for place, path in zip(places, (files.annotations, files.predictions), strict=True):
            place.parent.mkdir()
            shutil.copy(path, place)
        same = DataFiles(files.images, *places)
        assert same.fingerprint() == files.fingerprint() and len(set(files.fingerprint().values())) == 2
        assert files.fingerprint().keys() == {"annotations", "predictions"}
        assert replace(files, predictions=None).fingerprint().keys() == {"annotations"}

    def test_writing_again_changes_no_file(self, files: DataFiles, tmp_path: Path):
        """A cache of decoded objects stays fresh when a run is resumed."""
        AnnotatedSet.read(files).write(tmp_path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        AnnotatedSet.read(files).write(tmp_path)
        assert len(before) == 2 and before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    @pytest.mark.parametrize(
        ("objects", "processes", "batch", "micro"),
        [(16, 1, 16, 8), (99, 2, 16, 8), (15, 1, 8, 8), (7, 1, 7, 7), (1, 1, 1, 1), (7, 2, 6, 3), (15, 4, 12, 3)],
    )
    def test_the_batch_shrinks_to_the_data(self, objects: int, processes: int, batch: int, micro: int):
        config = fit_batch(TrainConfig(steps=1), objects, processes)
        assert (config.batch_size, config.micro_batch) == (batch, micro)
        assert (config.batch_size // config.micro_batch) % processes == 0


class TestValidation:
    def photo(self, folder: Path) -> Path:
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / "photo.png")
        return folder / "photo.png"

    def test_figures_are_those_of_the_public_path(self, tmp_path: Path):
        truth = np.stack([disc(30, 45, 22), disc(80, 45, 24)])
        coarse = np.stack([disc(83, 45, 24), disc(10, 10, 5), disc(33, 45, 22)])
        boxes = np.array([[58, 20, 108, 70], [4, 4, 16, 16], [10, 22, 56, 68]], np.float32)
        photo = self.photo(tmp_path)
        image = matched_image(photo, truth, coarse, boxes)
        assert len(image) == 2 and image.boxes.tolist() == boxes[[2, 0]].tolist()
        refiner = Refiner(eventful_model(encoder_config(depth=2)))
        record = Validation([image])(refiner)
        out = refiner.refine(photo, boxes=boxes[[2, 0]], masks=coarse[[2, 0]])
        for name, score in (("iou", mask_iou), ("boundary_iou", boundary_iou)):
            before, after = score(coarse[[2, 0]], truth), score(out.masks.numpy(), truth)
            assert record[f"{name}_coarse"] == pytest.approx(before.mean())
            assert record[name] == pytest.approx(after.mean()) != before.mean()
        worse = boundary_iou(out.masks.numpy(), truth) < boundary_iou(coarse[[2, 0]], truth) - 0.02
        gain = sum(record[name] - record[f"{name}_coarse"] for name in ("iou", "boundary_iou"))
        assert record["worse"] == worse.mean() and record["score"] == pytest.approx(gain - 0.2 * worse.mean())

    def test_recall_and_accuracy_are_of_all_photos_together(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        image = simulated_image(self.photo(tmp_path), disc(50, 45, 30)[None], (0, 0))
        counts = iter(
            (DetectorCounts(cells=100, judged=100, incoherent=wanted, found=10, hits=hits, right=right),)
            for wanted, hits, right in ((8, 6, 94), (2, 0, 90))
        )
        monkeypatch.setattr("transfiner_refine.training.validation.detector_counts", lambda out, truth: next(counts))
        record = Validation([image, image])(Refiner(RefinerModel(encoder_config(depth=1))))
        assert (record["recall_0"], record["accuracy_0"], record["nodes_0"]) == (0.6, 0.92, 10)

    def test_processes_share_the_photos_and_agree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        photo = self.photo(tmp_path)
        images = [simulated_image(photo, disc(20 + 15 * i, 45, 18)[None], (0, i)) for i in range(5)]
        validation, refiner = Validation(images), Refiner(eventful_model(encoder_config(depth=1)))
        alone = validation(refiner)
        shares = [[validation._judge(refiner, image) for image in images[rank::2]] for rank in range(2)]

        def gather(everything: list, mine: list) -> None:
            assert [len(part.scores) for part in mine] == [1] * len(shares[rank])
            everything[:] = shares

        for name, value in (("is_initialized", True), ("get_world_size", 2)):
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        for rank in range(2):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            assert validation(refiner) == alone

    def test_simulated_masks_depend_on_their_seed_alone(self, tmp_path: Path):
        truth = np.stack([disc(30, 45, 22), disc(80, 45, 24)])
        one, same, other = (simulated_image(tmp_path / "photo.png", truth, (3, seed)) for seed in (1, 1, 2))
        assert one.coarse == same.coarse != other.coarse and len(one) == 2

    def test_a_refinement_that_promises_nothing_counts_as_its_coarse_mask(self, tmp_path: Path, monkeypatch):
        truth = np.stack([disc(30, 45, 22), disc(80, 45, 24)])
        image = simulated_image(self.photo(tmp_path), truth, (0, 5))
        refiner = Refiner(eventful_model(encoder_config(depth=1, predicts_gain=True)))
        records = []
        for gains in ([1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]):
            monkeypatch.setattr(
                "transfiner_refine.training.validation._predicted_gains", lambda *given, g=gains: torch.tensor(g + g)
            )
            records.append(Validation([image])(refiner))
        all_taken, one_taken, none_taken = (record["boundary_iou"] for record in records)
        assert none_taken == records[0]["boundary_iou_coarse"] and len({all_taken, one_taken, none_taken}) == 3

    @pytest.fixture
    def predicting(self) -> RefinerModel:
        return RefinerModel(encoder_config(depth=1, predicts_gain=True))

    def test_each_photo_is_judged_by_a_predictor_fitted_to_others(self, predicting: RefinerModel):
        """In a fifth of the photos the gains are the opposite of what the others let one expect."""
        generator = torch.Generator().manual_seed(0)
        statistics = torch.randn(100, len(STATISTICS), generator=generator)
        statistics[:, 0] = statistics[:, 0].sign()
        photo = torch.arange(100) // 4
        odd = photo % 5 == 2
        gains = torch.where(odd, -0.05, 0.05) * statistics[:, 0]
        predicted = _predicted_gains(predicting, statistics, gains, photo)
        assert (predicted[~odd].sign() == gains[~odd].sign()).float().mean() > 0.9
        assert (predicted[odd].sign() == gains[odd].sign()).float().mean() < 0.1
        assert predicting.gain_predictor is not None
        kept = predicting.gain_predictor.weight.clone()
        fit_gain(predicting, statistics, gains)
        assert torch.equal(kept, predicting.gain_predictor.weight), "what is kept was fitted to all"

    @pytest.mark.parametrize(("objects", "photos"), [(79, 79), (100, 1)])
    def test_too_few_to_fit(self, predicting: RefinerModel, objects: int, photos: int):
        statistics = torch.randn(objects, len(STATISTICS))
        assert predicting.gain_predictor is not None
        with torch.no_grad():
            predicting.gain_predictor.weight.copy_(torch.arange(float(len(STATISTICS))))
        predicted = _predicted_gains(predicting, statistics, torch.randn(objects), torch.arange(objects) % photos)
        torch.testing.assert_close(predicted, statistics @ torch.arange(float(len(STATISTICS))))
        assert predicting.gain_predictor.weight.tolist() == list(range(len(STATISTICS)))

    def test_nothing_to_judge_by(self, tmp_path: Path):
        truth, coarse = disc(30, 45, 22)[None], disc(90, 45, 10)[None]
        image = matched_image(tmp_path / "photo.png", truth, coarse, np.zeros((1, 4), np.float32))
        with pytest.raises(InvalidInputError, match="at least one object to validate on, got none"):
            Validation([image])


def test_the_defaults_are_gentle():
    """What finds a good refiner's nodes stays, and the learning rate is half of training's."""
    assert FINE_TUNING.frozen_stages == 5 and FINE_TUNING.frozen_detector
    assert FINE_TUNING.learning_rate == TrainConfig(steps=1).learning_rate / 2
