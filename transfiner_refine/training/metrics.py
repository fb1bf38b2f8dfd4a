"""What a run reports while it goes on: a JSONL file, a picture of it, and a progress bar."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from transfiner_refine.data.coco import write_atomic
from transfiner_refine.errors import MissingDependencyError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingDependencyError(
        'training draws its figures with matplotlib, which is not installed: pip install "transfiner-refine[train]"'
    ) from error

METRICS = "metrics.jsonl"
PLOT = "metrics.png"
PROJECT = "transfiner-refine"

Record = dict[str, float]
"""Figures by name at one ``step``."""

Tracker = Literal["trackio"]

PANELS = (
    ("losses", ("loss",)),
    ("IoU, AP", ("iou", "gain", "_ap")),
    ("share made worse", ("worse",)),
    ("incoherence detector", ("recall", "precision", "accuracy")),
)
"""Title of each panel of the picture, and what the names of its figures contain."""


class MetricsLog:
    """The records of a run, on disk and in a tracker.

    Args:
        directory: Holds ``metrics.jsonl`` and ``metrics.png``.
        step: The step from which the run goes on: records of later ones, which were lost, are dropped. -1 drops all.
        writes: Whether anything is written: of several processes, one does.
        tracker: Where to send the records besides, or None.
        settings: What the tracker is told of the run.

    Attributes:
        records: All records so far.

    Raises:
        MissingDependencyError: If the tracker is not installed.
    """

    def __init__(
        self,
        directory: Path,
        step: int = 0,
        writes: bool = True,
        tracker: Tracker | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.directory, self.writes = directory, writes
        path = directory / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records: list[Record] = [json.loads(line) for line in lines if line.endswith("}")]
        self.records = [record for record in records if record["step"] <= step]
        if writes and len(self.records) < len(lines):
            write_atomic(path, "".join(f"{json.dumps(record)}\n" for record in self.records).encode())
        self._tracker = None
        if writes and tracker is not None:
            self._tracker = require_tracker()
            self._tracker.init(project=PROJECT, name=directory.resolve().name, config=dict(settings or {}))

    def write(self, record: Record) -> None:
        """Append a record."""
        self.records.append(record)
        if not self.writes:
            return
        with (self.directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tracker is not None:
            self._tracker.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def draw(self) -> None:
        """Draw the records so far."""
        if self.writes and len(self.records) > 1:
            write_atomic(self.directory / PLOT, draw_metrics(self.records))

    def close(self) -> None:
        """Tell the tracker that the run is over."""
        if self._tracker is not None:
            self._tracker.finish()


def require_tracker() -> Any:
    """The trackio package.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import trackio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError("trackio is not installed: pip install trackio, or leave --track out") from error
    return trackio


def draw_metrics(records: Sequence[Record]) -> bytes:
    """Draw the figures of a run over its steps, a panel for each kind.

    Args:
        records: Records of one run; a figure need not be in each.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    names = sorted({name for record in records for name in record})
    left = set(names)
    for axis, (title, parts) in zip(axes, PANELS, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        for name in names:
            if name in left and any(part in name for part in parts):
                left.discard(name)
                points = [(record["step"], record[name]) for record in records if name in record]
                style = ":" if name.endswith("coarse") else "-"
                axis.plot(*zip(*points, strict=True), style, marker=".", label=name.removeprefix("loss_"))
        if axis.lines:
            axis.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


class Bar:
    """Progress bar with the time left on standard error, and a line for each validation; silent if told so.

    Args:
        step: Steps made before.
        steps: Steps of the run.
        silent: Whether nothing is printed, as in all processes but the first.
    """

    def __init__(self, step: int, steps: int, silent: bool):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True, quiet=silent)
        self._progress = Progress(*columns, console=console, disable=silent)
        self._task = self._progress.add_task("Training", total=steps, completed=step)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """One step more."""
        self._progress.advance(self._task)

    def report(self, record: Record) -> None:
        """Print a record in one line, and show its loss before the bar."""
        if "loss" in record:
            self._progress.update(self._task, description=f"Training, loss {record['loss']:.3f}")
        text = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        self._progress.console.print(f"step {record['step']:.0f}: {text}", highlight=False, soft_wrap=True)
