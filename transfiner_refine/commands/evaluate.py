"""The command that measures results against ground truth, for :mod:`transfiner_refine.cli`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.coco import Result, check_apart, check_output, load_results, write_json_atomic
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.coco_metrics import AveragePrecision, average_precision
from transfiner_refine.evaluation.ground_truth import GroundTruth, load_ground_truth
from transfiner_refine.evaluation.incoherence import IncoherenceAnalysis, RegionFigures, analyse_incoherence
from transfiner_refine.evaluation.lvis import load_lvis


@dataclass(frozen=True)
class Measure:
    """One evaluation of a results file: its name in the JSON file, its ground truth, and what counts as overlap."""

    name: str
    truth: GroundTruth
    overlap: Literal["mask", "boundary"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one results file.

    Attributes:
        label: What the tables call it.
        count: Its results on the images evaluated.
        figures: Average precision by measure.
        analysis: What its incoherent regions hold, if asked for.
        filled: Average precision by measure after these were filled.
        no_analysis: Why there is no analysis although it was asked for.
    """

    label: str
    count: int
    figures: dict[str, AveragePrecision]
    analysis: IncoherenceAnalysis | None
    filled: dict[str, AveragePrecision]
    no_analysis: str | None = None


ROWS: tuple[tuple[str, str, Callable[[AveragePrecision], float]], ...] = (
    ("mask AP", "mask", lambda figures: figures.ap),
    ("AP50", "mask", lambda figures: figures.ap50),
    ("AP75", "mask", lambda figures: figures.ap75),
    ("APs", "mask", lambda figures: figures.small),
    ("APm", "mask", lambda figures: figures.medium),
    ("APl", "mask", lambda figures: figures.large),
    ("boundary AP", "boundary", lambda figures: figures.ap),
    ("AP*", "lvis_mask", lambda figures: figures.ap),
    ("boundary AP*", "lvis_boundary", lambda figures: figures.ap),
)
"""Rows of the table: heading, measure, and the figure of it."""


def evaluate(
    predictions: Annotated[
        list[Path], typer.Argument(help="COCO results files: before, then any number of others to compare with it.")
    ],
    annotations: Annotated[Path, typer.Option(help="COCO annotations of the images.")],
    lvis: Annotated[Path | None, typer.Option(help="LVIS annotations of the same images; adds AP*.")] = None,
    incoherence: Annotated[
        bool, typer.Option("--incoherence", help="Add how much of the error lies in incoherent regions.")
    ] = False,
    class_agnostic: Annotated[
        bool, typer.Option("--class-agnostic", help="Match masks regardless of category.")
    ] = False,
    only: Annotated[
        Path | None, typer.Option(help="Text file of image file names, one a line.", show_default="all images")
    ] = None,
    dilation: Annotated[
        float, typer.Option(min=0, max=1, help="Width of the boundary as a share of the image diagonal.")
    ] = 0.02,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures here, too.")] = None,
) -> None:
    """Measure results against ground truth: mask AP, boundary AP and AP*, before and after side by side."""
    if json_path is not None:
        read = {f"the results {path.name}": path for path in predictions}
        check_apart({"--json": json_path}, {**read, "--annotations": annotations, "--lvis": lvis, "--only": only})
        check_output(json_path)
    truth = load_ground_truth(annotations, None if only is None else _names(only))
    if class_agnostic:
        truth = truth.regardless_of_category()
    measures = [Measure("mask", truth, "mask"), Measure("boundary", truth, "boundary")]
    if lvis is not None:
        federated = load_lvis(lvis, truth)
        measures += [Measure("lvis_mask", federated, "mask"), Measure("lvis_boundary", federated, "boundary")]
    # All files are checked before the first is evaluated, which may take minutes.
    files = [_checked(path, truth) for path in predictions]
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    steps = len(files) * (len(measures) + (3 if incoherence else 0))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Evaluating", total=steps)
        evaluations = [
            _evaluate(label, results, measures, dilation, incoherence, lambda: progress.advance(task))
            for label, results in zip(_labels(predictions), files, strict=True)
        ]
    # Before the tables: a terminal that cannot print one of their characters must not lose the work.
    if json_path is not None:
        document = {
            "annotations": str(annotations),
            "lvis": None if lvis is None else str(lvis),
            "images": len(truth.sizes),
            "objects": len(truth.objects),
            "class_agnostic": class_agnostic,
            "dilation": dilation,
            "results": [_document(path, it) for path, it in zip(predictions, evaluations, strict=True)],
        }
        write_json_atomic(json_path, document)
    console.print(_table(evaluations, f"{len(truth.sizes)} images, {len(truth.objects)} objects"))
    for evaluation in evaluations:
        if evaluation.analysis is not None:
            console.print(_incoherence_table(evaluation, evaluation.analysis))
        elif evaluation.no_analysis is not None:
            note = f"no incoherence analysis of {evaluation.label}: {evaluation.no_analysis}"
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def _names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"expected a text file of image file names, got {path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _checked(path: Path, truth: GroundTruth) -> list[Result]:
    results = load_results(path)
    try:
        return truth.check_results(results)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error


def _labels(paths: Sequence[Path]) -> list[str]:
    """What tables call files: the name alone, if no two are alike."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _evaluate(
    label: str,
    results: Sequence[Result],
    measures: Sequence[Measure],
    dilation: float,
    incoherence: bool,
    advance: Callable[[], None],
) -> Evaluation:
    def measured(entries: Sequence[Result], chosen: Sequence[Measure]) -> dict[str, AveragePrecision]:
        figures = {}
        for measure in chosen:
            figures[measure.name] = average_precision(measure.truth, entries, measure.overlap, dilation)
            advance()
        return figures

    figures = measured(results, measures)
    if not incoherence:
        return Evaluation(label, len(results), figures, None, {})
    try:
        analysis = analyse_incoherence(measures[0].truth, results)
    except InvalidInputError as error:  # the results are checked: none of them is one of an object
        for _ in range(3):
            advance()
        return Evaluation(label, len(results), figures, None, {}, no_analysis=str(error))
    advance()
    return Evaluation(label, len(results), figures, analysis, measured(analysis.filled, measures[:2]))


def _table(evaluations: Sequence[Evaluation], title: str) -> Table:
    first, *others = evaluations
    table = Table("points, of 100", title=title)
    for evaluation in evaluations:
        table.add_column(evaluation.label, justify="right", overflow="fold")
        if evaluation is not first:
            table.add_column("difference", justify="right")
    for heading, name, figure in ROWS:
        if name not in first.figures:
            continue
        before = figure(first.figures[name])
        cells = [_points(before)]
        for other in others:
            after = figure(other.figures[name])
            cells += [_points(after), _points(after - before, sign="+")]
        table.add_row(heading, *cells)
    return table


def _incoherence_table(evaluation: Evaluation, analysis: IncoherenceAnalysis) -> Table:
    """The paper's Table 1 of one results file."""
    before, after = evaluation.figures, evaluation.filled
    gains = (f"{_points(before[name].ap)} to {_points(after[name].ap)}" for name in ("mask", "boundary"))
    table = Table(
        title=f"incoherent regions: {analysis.count} detections of an object in {evaluation.label}",
        caption="All regions filled with ground truth: mask AP {}, boundary AP {}. ".format(*gains)
        + f"{_percent(analysis.errors_beyond)} of the masks' errors lie beyond their boxes.",
    )
    table.add_column("cells")
    for heading in ("of the box", "of its errors", "accuracy inside", "accuracy outside"):
        table.add_column(heading, justify="right")

    def add(name: str, region: RegionFigures) -> None:
        shares = (region.area, region.errors, region.accuracy, region.accuracy_outside)
        table.add_row(name, *map(_percent, shares))

    for level, region in enumerate(analysis.levels):
        add(f"{ROOT_SIDE << level}×{ROOT_SIDE << level}", region)
    add("all", analysis.union)
    return table


def _document(path: Path, evaluation: Evaluation) -> dict[str, Any]:
    """One file's figures for JSON."""
    document: dict[str, Any] = {"file": str(path), "count": evaluation.count}
    document |= {name: asdict(figures) for name, figures in evaluation.figures.items()}
    if (analysis := evaluation.analysis) is not None:
        document["incoherence"] = {
            "count": analysis.count,
            "levels": [asdict(region) for region in analysis.levels],
            "union": asdict(analysis.union),
            "errors_beyond": analysis.errors_beyond,
            "filled": {name: asdict(figures) for name, figures in evaluation.filled.items()},
        }
    elif evaluation.no_analysis is not None:
        document["incoherence"] = None
    return _without_nan(document)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands where there was nothing to measure."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _points(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{100 * value:{sign}.2f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
