"""Runs of the training loop: they follow their schedule, keep what is best, and go on exactly where they stopped."""

import json
import math
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from training_runs import OBJECTS, SIX_STEPS, Discs, Scores, checkpoint, metrics, run, tiny_model, weights

from transfiner_refine import InvalidInputError, MissingDependencyError, Refiner
from transfiner_refine.errors import TrainingError
from transfiner_refine.training.checkpoint import MAY_CHANGE
from transfiner_refine.training.losses import LossConfig, RefinementLoss
from transfiner_refine.training.schedule import (
    MicroBatches,
    TrainConfig,
    learning_rate_factor,
    mix_seed,
    parameter_groups,
    validation_interval,
)


class TestSchedule:
    CONFIG = TrainConfig(steps=1, batch_size=4, micro_batch=2, seed=3)

    def test_every_object_at_most_once_an_epoch_from_any_step(self):
        batches = MicroBatches(11, self.CONFIG)
        first = list(batches)
        assert [len(batch) for batch in first] == [2] * 4 and first == list(batches)
        assert len({index for batch in first for index in batch}) == 8
        batches.start = 1
        assert list(batches) == first[2:] and len(batches) == 2
        batches.epoch, batches.start = 1, 0
        assert list(batches) != first
        left_out = set()
        for batches.epoch in range(5):
            left_out |= set(range(11)) - {index for batch in batches for index in batch}
        assert len(left_out) > 3, "other objects in each epoch"

    def test_processes_share_each_step_in_order(self):
        alone = list(MicroBatches(11, self.CONFIG))
        halves = [list(MicroBatches(11, self.CONFIG, process, 2)) for process in range(2)]
        assert [batch for step in zip(*halves, strict=True) for batch in step] == alone
        with pytest.raises(InvalidInputError, match=r"share the 2 micro-batches of a step evenly.*got 3 processes"):
            MicroBatches(11, self.CONFIG, 0, 3)

    def test_seeds_differ_by_every_part(self):
        seeds = {mix_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
        assert len(seeds) == 64 and mix_seed(1, 2, 3) == mix_seed(1, 2, 3) and max(seeds) < 2**63

    def test_learning_rate(self):
        config = TrainConfig(steps=100, warmup=10, decay=0.2)
        factors = [learning_rate_factor(step, config) for step in range(100)]
        assert factors[0] == 0.1 and factors[9:81] == [1.0] * 72
        assert factors[90] == 0.5 and factors[99] == 0.05

    def test_short_epochs_are_validated_together(self):
        assert [validation_interval(self.CONFIG, steps) for steps in (1, 3, 50, 51, 700)] == [50, 51, 50, 51, 700]
        assert validation_interval(replace(self.CONFIG, validate_every=7), 3) == 7

    def test_norms_biases_and_embeddings_do_not_decay(self):
        model = tiny_model()
        assert model.image_encoder is not None
        model.image_encoder.backbone.freeze(3)
        groups = parameter_groups(model, TrainConfig(steps=1, weight_decay=0.1, backbone_scale=0.2))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        seen = Counter(id(parameter) for group in groups for parameter in group["params"])
        assert set(seen.values()) == {1} and len(seen) == sum(p.requires_grad for p in model.parameters())
        for group in groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                decays = parameter.ndim > 1 and name != "transfiner.node_encoder.level.weight"
                assert group["weight_decay"] == (0.1 if decays else 0.0), name
                assert group["scale"] == (0.2 if ".backbone." in name else 1.0), name

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": 0}, "steps of at least 1, got 0"),
            ({"patience": 0}, "patience of at least 1"),
            ({"workers": -1}, "workers of at least 0"),
            ({"learning_rate": 0.0}, "learning_rate above 0"),
            ({"learning_rate": math.nan}, "learning_rate above 0"),
            ({"ema": 1.0}, "ema from 0 to below 1"),
            ({"decay": 1.5}, "decay from 0 to 1"),
            ({"frozen_stages": 6}, "frozen_stages from 0 to 5"),
            ({"precision": "fp16"}, 'precision "auto", "bf16" or "no"'),
            ({"batch_size": 12}, "batch_size as a multiple of micro_batch, got 12 and 8"),
        ],
    )
    def test_impossible_schedules(self, change, message):
        with pytest.raises(InvalidInputError, match=message):
            TrainConfig(**({"steps": 1} | change))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest of these runs; ``whole_run``, which is made before, has its picture."""
    monkeypatch.setattr("transfiner_refine.training.metrics.draw_metrics", lambda records: b"")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one go, each two followed by a checkpoint. Not to be changed."""
    directory = tmp_path_factory.mktemp("whole")
    run(directory)
    return directory


def assert_same_state(a: Path, b: Path) -> None:
    """Bit by bit: weights, their average and the optimiser."""
    for part in ("model", "average"):
        ours, theirs = checkpoint(a)[part], checkpoint(b)[part]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (checkpoint(directory)["optimizer"]["state"] for directory in (a, b))
    assert all(torch.equal(ours[i][name], theirs[i][name]) for i in theirs for name in theirs[i])


class TestRuns:
    def test_what_a_run_leaves(self, whole_run: Path):
        names = {"run.json", "last.pt", "metrics.jsonl", "metrics.png", "best"}
        assert {path.name for path in whole_run.iterdir()} == names
        records = metrics(whole_run)
        assert [record["step"] for record in records] == [0, 2, 4, 6]
        for name in ("loss", "loss_refine", "loss_incoherence", "gradient_norm", "wrong_after", "samples_per_s"):
            assert all(math.isfinite(record[name]) for record in records[1:]), name
        assert records[1]["loss"] == pytest.approx(records[1]["loss_refine"] + records[1]["loss_incoherence"])
        assert [record["learning_rate"] for record in records[1:]] == pytest.approx([1e-3, 1e-3, 1e-3 / 1.8])
        assert checkpoint(whole_run)["progress"]["step"] == 6
        assert Refiner.from_pretrained(whole_run / "best").config == tiny_model().config
        with Image.open(whole_run / "metrics.png") as plot:
            assert plot.size == (1100, 700)

    def test_it_trains_what_is_not_frozen(self, whole_run: Path):
        before, after = tiny_model().state_dict(), weights(whole_run)
        for name in before:
            frozen = any(f"backbone.stages.{stage}." in name for stage in range(SIX_STEPS.frozen_stages))
            assert torch.equal(before[name], after[name]) == frozen, name

    def test_a_frozen_detector_finds_what_it_found(self, tmp_path: Path):
        run(tmp_path, config=replace(SIX_STEPS, steps=1, frozen_detector=True))
        before, after = tiny_model().state_dict(), weights(tmp_path)
        for name in before:
            frozen = name.startswith(("image_encoder.", "transfiner.incoherence_detector."))
            assert not frozen or torch.equal(before[name], after[name]), name
        corrects = "transfiner.pixel_decoder.layers.2.weight"
        assert not torch.equal(before[corrects], after[corrects])

    def test_the_backbone_has_a_learning_rate_of_its_own(self, tmp_path: Path):
        run(tmp_path, config=replace(SIX_STEPS, steps=1, backbone_scale=0.0))
        before, after = tiny_model().state_dict(), weights(tmp_path)
        assert all(torch.equal(before[name], after[name]) for name in before if ".backbone." in name)
        changed = "transfiner.incoherence_detector.classifier.weight"
        assert not torch.equal(before[changed], after[changed])

    def test_the_best_is_kept_and_what_is_judged_is_the_average(self, tmp_path: Path):
        validate = Scores(0.0, 0.1, 0.9, 0.5)
        result = run(tmp_path, validate=validate, card=lambda result: f"# Best at {result.best['step']}")
        best = Refiner.from_pretrained(tmp_path / "best").model.state_dict()
        judged = validate.judged
        assert all(torch.equal(best[name], judged[2][name].half().float()) for name in best)
        average = checkpoint(tmp_path)["average"]
        assert all(torch.equal(average[f"module.{name}"], judged[3][name]) for name in best)
        assert (result.start["score"], result.best["score"], result.best["step"]) == (0.0, 0.9, 4)
        assert result.directory == tmp_path / "best" and result.steps == 6 and not result.ended_early
        assert (tmp_path / "best" / "README.md").read_text() == "# Best at 4"

    def test_the_start_is_the_best_if_training_does_harm(self, tmp_path: Path):
        """What a user gets is never worse on the validation data than what they had."""
        result = run(tmp_path, validate=Scores(0.5, 0.4, 0.3, 0.2))
        best, before = Refiner.from_pretrained(tmp_path / "best").model.state_dict(), tiny_model().state_dict()
        assert all(torch.equal(best[name], before[name].half().float()) for name in best)
        assert result.best == result.start and result.steps == 6

    def test_without_progress_it_ends_early_and_stays_ended(self, tmp_path: Path):
        config = replace(SIX_STEPS, steps=50, patience=2)
        result = run(tmp_path, config=config, validate=Scores(0.0, 0.3, 0.2, 0.1))
        assert result.ended_early and result.steps == 6 and result.best["step"] == 2
        dataset = Discs()
        assert run(tmp_path, dataset, config).ended_early and dataset.seen == []
        assert run(tmp_path, dataset, replace(config, patience=3)).steps == 8, "with more patience it goes on"

    def test_a_finished_run_does_nothing_more(self, whole_run: Path):
        before = (whole_run / "last.pt").read_bytes()
        dataset = Discs()
        result = run(whole_run, dataset)
        assert dataset.seen == [] and (whole_run / "last.pt").read_bytes() == before
        assert result.steps == 6 and result.best["step"] == 0

    def test_a_step_is_the_mean_of_its_micro_batches(self, tmp_path: Path):
        """Each with random choices that depend on the seed, the step and its place, computed here one by one."""
        run(tmp_path, config=replace(SIX_STEPS, steps=1, warmup=0))
        model, dataset = tiny_model(), Discs()
        assert model.image_encoder is not None
        model.image_encoder.backbone.freeze(SIX_STEPS.frozen_stages)
        objective, losses = RefinementLoss(model, LossConfig()), []
        for place, batch in zip((0, 1), MicroBatches(OBJECTS, SIX_STEPS), strict=False):
            sample = [column[None] for column in dataset[batch[0]]][:5]
            torch.manual_seed(mix_seed(SIX_STEPS.seed, 0, place))
            values = objective(*sample)
            losses.append(values["loss_refine"] + values["loss_incoherence"])
        mean = torch.stack(losses).mean()
        mean.backward()
        mean = mean.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        record = metrics(tmp_path)[1]
        assert record["loss"] == pytest.approx(float(mean), rel=1e-6)
        assert record["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)

    def test_bfloat16(self, tmp_path: Path, whole_run: Path):
        run(tmp_path, config=replace(SIX_STEPS, precision="bf16"))
        exact, rounded = (metrics(directory)[1]["loss"] for directory in (whole_run, tmp_path))
        assert exact != rounded and exact == pytest.approx(rounded, rel=0.02)
        assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())

    @pytest.mark.parametrize("native", [False, True])
    def test_automatic_precision(self, native: bool, tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("transfiner_refine.training.schedule.is_bf16_native", lambda device: native)
        run(tmp_path, config=replace(SIX_STEPS, precision="auto"))
        exact, found = (metrics(directory)[1]["loss"] for directory in (whole_run, tmp_path))
        assert (exact != found) == native

    def test_fewer_objects_than_a_batch(self, tmp_path: Path):
        with pytest.raises(InvalidInputError, match="one batch of 16 objects, got 5 objects: lower batch_size"):
            run(tmp_path, config=replace(SIX_STEPS, batch_size=16))


class TestResuming:
    def test_interrupted_and_resumed_equals_one_go(self, whole_run: Path, tmp_path: Path):
        """Stopped in step 4, resumed from step 3, in the middle of an epoch and of what is recorded together."""

        def stop() -> None:
            raise KeyboardInterrupt

        config = replace(SIX_STEPS, save_every=3, validate_every=4)
        first, second = Discs(limit=7, at_limit=stop), Discs()
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, first, config)
        assert checkpoint(tmp_path)["progress"]["step"] == 3 and [r["step"] for r in metrics(tmp_path)] == [0]
        run(tmp_path, second, config)
        assert_same_state(tmp_path, whole_run)
        assert first.seen[:6] + second.seen == samples_of_six_steps()
        (_, early, middle, late), records = metrics(whole_run), metrics(tmp_path)
        assert [record["step"] for record in records] == [0, 4, 6]
        assert records[1]["loss"] == pytest.approx((early["loss"] + middle["loss"]) / 2)
        assert records[2]["loss"] == late["loss"]

    def test_records_after_the_checkpoint_are_dropped(self, whole_run: Path, tmp_path: Path):
        run(tmp_path, config=replace(SIX_STEPS, steps=4))
        kept = (tmp_path / "metrics.jsonl").read_text()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "score": 1.0}\n{"step": 6, "sc')
        run(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text().startswith(kept)
        assert [record["step"] for record in metrics(tmp_path)] == [0, 2, 4, 6]

    def test_killed_before_its_first_checkpoint(self, tmp_path: Path):
        """It starts anew, and so do its records."""
        run(tmp_path, config=replace(SIX_STEPS, steps=2))
        (tmp_path / "last.pt").unlink()
        run(tmp_path, config=replace(SIX_STEPS, steps=2))
        assert [record["step"] for record in metrics(tmp_path)] == [0, 2]

    def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(self, tmp_path: Path):
        run(tmp_path, config=replace(SIX_STEPS, steps=2))
        before = (tmp_path / "last.pt").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill_the_disk(refiner: Refiner) -> dict[str, float]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
            return {"score": -1.0}

        try:
            with pytest.raises((OSError, RuntimeError)):
                run(tmp_path, config=replace(SIX_STEPS, steps=4), validate=fill_the_disk)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "last.pt").read_bytes() == before

    def test_a_checkpoint_takes_its_name_when_it_is_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run(tmp_path, config=replace(SIX_STEPS, steps=2))
        before = (tmp_path / "last.pt").read_bytes()

        replace_file = os.replace

        def interrupt(source: Path, target: Path) -> None:
            if Path(target).name == "last.pt":
                assert torch.load(source, weights_only=True)["progress"]["step"] == 4
                raise KeyboardInterrupt
            replace_file(source, target)

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, config=replace(SIX_STEPS, steps=4))
        assert (tmp_path / "last.pt").read_bytes() == before

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"config": replace(SIX_STEPS, learning_rate=5e-4)}, "train.learning_rate"),
            ({"loss_config": LossConfig(refine_weight=2.0)}, "loss.refine_weight"),
            ({"record": {"data": "others"}}, "data"),
        ],
    )
    def test_another_run_in_the_directory(self, whole_run: Path, change: dict, name: str):
        before = {path: path.read_bytes() for path in whole_run.glob("*.*")}
        with pytest.raises(InvalidInputError, match=f"differs in {name}: choose another output"):
            run(whole_run, **change)
        assert before == {path: path.read_bytes() for path in whole_run.glob("*.*")}

    def test_a_checkpoint_without_its_record(self, tmp_path: Path):
        (tmp_path / "last.pt").write_bytes(b"")
        with pytest.raises(InvalidInputError, match=r"expected run\.json beside last\.pt"):
            run(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("metrics.jsonl", None, r"expected the figures of .* in .*metrics\.jsonl, got none of step 0: restore"),
            ("metrics.jsonl", '{"step": 0, "score": 0.0}\n', "got none of step 2: restore"),
            ("last.pt", 0.5, r"expected a whole checkpoint in .*last\.pt, got a damaged one: restore the file"),
            ("last.pt", 0.0, r"expected a whole checkpoint in .*last\.pt, got a damaged one: restore the file"),
            ("best", None, "expected the best weights so far, of step 2, in .*best, got none: restore the folder"),
        ],
    )
    def test_parts_of_a_run(self, tmp_path: Path, name: str, content: str | float | None, message: str):
        run(tmp_path, config=replace(SIX_STEPS, steps=2), validate=Scores(0.0, 1.0))
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        elif content is not None:
            whole = path.read_bytes()
            path.write_bytes(whole[: int(content * len(whole))])
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        with pytest.raises(InvalidInputError, match=message):
            run(tmp_path)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def test_what_does_not_touch_the_steps_made_may_change(self, tmp_path: Path):
        run(tmp_path, config=replace(SIX_STEPS, steps=2))
        changed = replace(SIX_STEPS, steps=3, validate_every=1, save_every=1, log_every=1, patience=9, max_skipped=2)
        assert set(json.loads((tmp_path / "run.json").read_text())["train"]) > MAY_CHANGE
        assert run(tmp_path, config=changed).steps == 3


class TestUnsoundGradients:
    def test_a_bad_step_is_left_out_and_counted(self, tmp_path: Path):
        """Step 3 meets a weight that is not a number: the weights stay those of step 2, and the run goes on."""
        validate = Scores(0.0)
        run(tmp_path, Discs(spoilt=range(4, 5)), replace(SIX_STEPS, validate_every=1), validate=validate)
        records = {record["step"]: record for record in metrics(tmp_path)}
        assert [records[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
        second, third, fourth = validate.judged[2:5]
        assert all(torch.equal(second[name], third[name]) for name in second)
        assert not all(torch.equal(third[name], fourth[name]) for name in second)
        assert all(value.isfinite().all() for value in weights(tmp_path).values())
        assert "loss" not in records[3] and math.isfinite(records[4]["loss"])

    def test_several_in_a_row_end_the_run_and_spare_the_checkpoint(self, tmp_path: Path):
        config = replace(SIX_STEPS, steps=50, validate_every=1, max_skipped=3)
        with pytest.raises(TrainingError, match="3 steps in a row without, up to step 5: lower the learning rate"):
            run(tmp_path, Discs(spoilt=range(4, 99)), config)
        assert checkpoint(tmp_path)["progress"]["step"] == 2
        dataset = Discs()
        run(tmp_path, dataset, replace(config, steps=3))
        assert len(dataset.seen) == 2


class TestTracker:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
        """What the tracker is told."""
        calls: list = []
        fake = SimpleNamespace(
            init=lambda **values: calls.append(("init", values["project"], values["name"])),
            log=lambda figures, step: calls.append(("log", step, figures)),
            finish=lambda: calls.append(("finish",)),
        )
        monkeypatch.setitem(sys.modules, "trackio", fake)
        yield calls

    def test_it_is_told_what_the_file_is_told(self, tmp_path: Path, calls: list):
        run(tmp_path / "name", tracker="trackio")
        assert calls[0] == ("init", "transfiner-refine", "name") and calls[-1] == ("finish",)
        logged = [{"step": step} | figures for _, step, figures in calls[1:-1]]
        assert logged == metrics(tmp_path / "name")

    def test_one_that_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "trackio", None)
        with pytest.raises(MissingDependencyError, match="pip install trackio"):
            run(tmp_path / "new", tracker="trackio")
        assert not (tmp_path / "new").exists()


def samples_of_six_steps() -> list[tuple[int, int]]:
    """Three epochs of two batches of two, the fifth object of each left out."""
    batches, samples = MicroBatches(OBJECTS, SIX_STEPS), []
    for batches.epoch in range(3):
        samples += [(batches.epoch, index) for (index,) in batches]
    return samples
