"""One training loop on Hugging Face accelerate: seeded, resumable to the step, validated through the full inference.

Every random choice depends on the seed, the step and the place in its batch alone. A run that was killed goes on as if
nothing had happened, and one process learns what several learn together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from transfiner_refine.data.coco import write_atomic
from transfiner_refine.data.crops import CropSample, init_worker
from transfiner_refine.errors import InvalidInputError, MissingDependencyError, TrainingError
from transfiner_refine.modeling.hub import CARD
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.checkpoint import (
    Progress,
    check_record,
    load_checkpoint,
    save_checkpoint,
    write_record,
)
from transfiner_refine.training.losses import LossConfig
from transfiner_refine.training.metrics import METRICS, Bar, MetricsLog, Record, Tracker, require_tracker
from transfiner_refine.training.schedule import (
    MicroBatches,
    TrainConfig,
    learning_rate_factor,
    mix_seed,
    mixed_precision,
    validation_interval,
    warming_average,
)
from transfiner_refine.training.statistics import RunningStatistics
from transfiner_refine.training.task import CropTask, Task, Validate

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs
except ImportError as error:
    raise MissingDependencyError(
        'training needs accelerate, which is not installed: pip install "transfiner-refine[train]"'
    ) from error

BEST = "best"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        directory: The best weights, in the form that users load: a refiner's directory.
        steps: Steps made.
        start: Figures of what training started from.
        best: Figures of the best weights, which may be those that training started from.
        ended_early: Whether the run ended before its last step, for lack of progress.
    """

    directory: Path
    steps: int
    start: Record
    best: Record
    ended_early: bool


def make_accelerator() -> Accelerator:
    """The processes and the device of a run, as ``accelerate launch`` or ``torchrun`` set them up; alone if neither."""
    # Where the work divides differs from RoI to RoI, so that a weight may have no part in the loss of one process.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Under torchrun, accelerate starts gloo only if it is told that there is no other device.
    alone = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # The loop's own autocast, since a process has one accelerate state for all of its runs.
    return Accelerator(cpu=alone, mixed_precision="no", kwargs_handlers=[unused])


def train(
    model: RefinerModel,
    dataset: Dataset[CropSample],
    directory: Path,
    config: TrainConfig,
    loss_config: LossConfig,
    validate: Validate,
    *,
    record: Mapping[str, Any] | None = None,
    card: Callable[[TrainResult], str] | None = None,
    tracker: Tracker | None = None,
) -> TrainResult:
    """Train a refiner; a run that was interrupted goes on from its last checkpoint.

    Args:
        model: The model, initialised; parts of it are frozen as ``config`` says.
        dataset: Samples of :class:`~transfiner_refine.data.crops.CropDataset`, with ``set_epoch``.
        directory: Gets ``run.json`` (what run it is), ``last.pt`` (everything to resume), ``metrics.jsonl`` and its
            picture ``metrics.png``, and ``best/``, the refiner with the highest ``score``.
        config: Schedule.
        loss_config: Objective.
        validate: Judges the averaged weights, before the first step and as often as ``config`` says; called by every
            process with equal weights, and to return the same in each.
        record: What else makes the run what it is, such as its data: a directory with another record is refused.
        card: Model card of ``best/``; None leaves a general one.
        tracker: Where the records go besides ``metrics.jsonl``.

    Returns:
        Where the best refiner is, and the figures of it and of the start.

    Raises:
        InvalidInputError: If the data set has fewer objects than one batch, the processes cannot share a batch, or the
            directory holds another run, or parts of one.
        TrainingError: If the gradient stays infinite or undefined; the last checkpoint is kept.
        MissingDependencyError: If the tracker is not installed.
    """
    task = CropTask(model, dataset, loss_config, validate, record or {})
    return run_task(task, directory, config, card=card, tracker=tracker)


def run_task(
    task: Task,
    directory: Path,
    config: TrainConfig,
    *,
    card: Callable[[TrainResult], str] | None = None,
    tracker: Tracker | None = None,
) -> TrainResult:
    """Train whatever a task trains; a run that was interrupted goes on from its last checkpoint.

    Args:
        task: Model, data, objective and validation.
        directory: See :func:`train`; also ``config``, ``card`` and ``tracker``.
        config: See there.
        card: See there.
        tracker: See there.

    Returns:
        Where the best weights are, and the figures of them and of the start.

    Raises:
        InvalidInputError: As :func:`train`, also the other errors.
    """
    if tracker is not None:
        require_tracker()
    settings = {"train": asdict(config), **task.record}
    check_record(directory, settings)
    run = _Run(task, directory, config, card)
    accelerator = run.accelerator
    accelerator.wait_for_everyone()  # nobody writes before everybody has checked
    if accelerator.is_main_process:
        write_record(directory, settings)
    is_main = accelerator.is_main_process
    run.log = MetricsLog(directory, -1 if run.is_new else run.progress.step, is_main, tracker, settings)
    with Bar(run.progress.step, config.steps, silent=not is_main) as bar:
        run.go(bar)
    run.log.close()
    return run.result()


class _Run:
    """The moving parts of one run, in one process of it."""

    log: MetricsLog

    def __init__(
        self,
        task: Task,
        directory: Path,
        config: TrainConfig,
        card: Callable[[TrainResult], str] | None,
    ):
        torch.set_flush_denormal(True)
        assert isinstance(task.dataset, Sized)
        self.task, self.directory, self.config, self.card = task, directory, config, card
        self.accelerator = make_accelerator()
        self.device = self.accelerator.device
        self.batches = MicroBatches(
            len(task.dataset), config, self.accelerator.process_index, self.accelerator.num_processes, task.unit
        )
        self.interval = validation_interval(config, self.batches.steps)
        self.model = task.model.to(self.device)
        groups = task.parameter_groups(config)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
        self.average = AveragedModel(self.model, avg_fn=warming_average(config.ema))
        resumed = load_checkpoint(directory, self.model, self.average, self.optimizer)
        self.progress = resumed or Progress()
        self.is_new = resumed is None
        if not self.is_new:
            self._check_kept()
        self.objective = self.accelerator.prepare(task.objective()).train()
        self.statistics = RunningStatistics(self.model)
        self.loader = DataLoader(
            task.dataset,
            batch_sampler=self.batches,
            collate_fn=task.collate,
            num_workers=config.workers,
            worker_init_fn=init_worker,
            persistent_workers=config.workers > 0,
            prefetch_factor=4 if config.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        self.seconds = 0.0  # of training since the last record
        self.since = 0  # steps of this process in these seconds

    def _check_kept(self) -> None:
        """Make sure that what the run will end with is still there: the best weights, and two records of figures."""
        progress, path = self.progress, self.directory / METRICS
        records = MetricsLog(self.directory, progress.step, writes=False).records
        judged = {record["step"] for record in records if "score" in record}
        if lost := sorted({0, progress.best_step} - judged):
            raise InvalidInputError(
                f"expected the figures of every validation so far in {path}, got none of step {lost[0]}: restore the "
                "file, or choose another output"
            )
        best = self.directory / BEST
        if progress.best > -math.inf and not best.is_dir():
            raise InvalidInputError(
                f"expected the best weights so far, of step {progress.best_step}, in {best}, got none: restore the "
                "folder, or choose another output"
            )

    def go(self, bar: Bar) -> None:
        """Train until the last step, or until nothing improves."""
        progress, config = self.progress, self.config
        if self.is_new:
            self._judge(bar)
        while progress.step < config.steps and not self._is_stalled():
            batches = self._epoch()
            for _ in range(min(self.batches.steps - self.batches.start, config.steps - progress.step)):
                started = time.perf_counter()
                self._step(batches)
                self.seconds, self.since = self.seconds + time.perf_counter() - started, self.since + 1
                bar.advance()
                last = progress.step == config.steps
                if last or progress.step % self.interval == 0:
                    self._judge(bar)
                    if self._is_stalled():
                        return
                else:
                    if progress.step % config.log_every == 0:
                        self._record()
                    if progress.step % config.save_every == 0:
                        self._save()

    def _is_stalled(self) -> bool:
        """Whether the last validations were all without progress."""
        return self.config.patience is not None and self.progress.stale >= self.config.patience

    def _epoch(self) -> Iterator[Any]:
        """The micro-batches that are left of the epoch in which the run stands."""
        self.batches.epoch, self.batches.start = divmod(self.progress.step, self.batches.steps)
        self.task.dataset.set_epoch(self.batches.epoch)  # type: ignore[attr-defined]
        return iter(self.loader)

    def _step(self, batches: Iterator[Any]) -> None:
        """One step of the optimiser, unless its gradient is not finite."""
        progress, config, places = self.progress, self.config, self.batches.places
        sums: dict[str, Tensor] = {}
        self.statistics.begin()
        for place in places:
            batch = self.task.to_device(next(batches), self.device)
            torch.manual_seed(mix_seed(config.seed, progress.step, place))
            # Gradients of the processes are averaged once a step.
            is_last = place == places[-1]
            with nullcontext() if is_last else self.accelerator.no_sync(self.objective):
                with mixed_precision(self.device, config.precision):
                    losses = self.objective(*batch)
                loss = torch.stack([value for name, value in losses.items() if name.startswith("loss")]).sum()
                self.accelerator.backward(loss / len(places))
            self.statistics.collect()
            for name, value in (losses | {"loss": loss}).items():
                sums[name] = sums.get(name, 0) + value.detach().float() / len(places)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * group["scale"] * learning_rate_factor(progress.step, config)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip))  # type: ignore[arg-type]
        progress.step += 1
        if math.isfinite(norm):  # the gradient is that of all processes, so that all of them decide alike
            self.optimizer.step()
            self.statistics.apply(len(places), self._mean_over_processes)
            self.average.update_parameters(self.model)
            progress.skipped_in_a_row = 0
            progress.count += 1
            values = [*torch.stack(list(sums.values())).tolist(), norm]
            for name, value in zip([*sums, "gradient_norm"], values, strict=True):
                progress.losses[name] = progress.losses.get(name, 0.0) + value
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if progress.skipped_in_a_row >= config.max_skipped:
            raise TrainingError(
                f"expected finite gradients, got {config.max_skipped} steps in a row without, up to step "
                f"{progress.step}: lower the learning rate, or train with precision 'no'; the last checkpoint in "
                f"{self.directory} is from before"
            )

    def _judge(self, bar: Bar) -> None:
        """Validate the averaged weights, keep them if they are the best so far, and save where the run stands."""
        progress = self.progress
        averaged = self.average.module
        started = time.perf_counter()
        figures = self.task.judge(averaged)
        figures["validation_s"] = time.perf_counter() - started
        is_best = figures["score"] > progress.best
        if is_best:
            progress.best, progress.best_step, progress.stale = figures["score"], progress.step, 0
        else:
            progress.stale += 1
        record = self._record(figures)
        bar.report({name: record[name] for name in ("step", "loss", *figures) if name in record})
        self.log.draw()
        if is_best and self.accelerator.is_main_process:
            self.task.save(averaged, self.directory / BEST)
            if self.card is not None:
                write_atomic(self.directory / BEST / CARD, self.card(self.result()).encode())
        self._save()

    def _record(self, figures: Record | None = None) -> Record:
        """Write the mean losses since the last record, and the figures of a validation."""
        progress, config = self.progress, self.config
        self._share_losses()
        record: Record = {"step": progress.step, "epoch": progress.step / self.batches.steps}
        if progress.count:
            record |= {name: value / progress.count for name, value in progress.losses.items()}
        if self.since:
            record["learning_rate"] = config.learning_rate * learning_rate_factor(progress.step - 1, config)
            record["samples_per_s"] = self.since * config.batch_size / self.seconds
            record["skipped"] = progress.skipped
        record |= figures or {}
        progress.losses, progress.count = {}, 0
        self.seconds, self.since = 0.0, 0
        self.log.write(record)
        return record

    def _share_losses(self) -> None:
        """Replace the sums of the losses by their mean over processes."""
        losses = self.progress.losses
        if losses and self.accelerator.num_processes > 1:
            mean = self._mean_over_processes(torch.tensor(list(losses.values()), device=self.device))
            self.progress.losses = dict(zip(losses, mean.tolist(), strict=True))

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="mean")  # type: ignore[return-value]

    def _save(self) -> None:
        """Write a checkpoint, unless the run may be failing."""
        self._share_losses()
        if self.accelerator.is_main_process and not self.progress.skipped_in_a_row:
            save_checkpoint(self.directory, self.model, self.average, self.optimizer, self.progress)

    def result(self) -> TrainResult:
        """How the run stands."""
        judged = {record["step"]: record for record in self.log.records if "score" in record}
        return TrainResult(
            directory=self.directory / BEST,
            steps=self.progress.step,
            start=judged[0],
            best=judged[self.progress.best_step],
            ended_early=self.progress.step < self.config.steps,
        )
