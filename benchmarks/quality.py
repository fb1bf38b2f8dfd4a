"""How much a refiner improves a real detector's masks, beside what needs no learning.

    python benchmarks/quality.py davis_dev

Each object of the ground truth is paired with at most one detection: the pair of highest mask IoU first, regardless of
category and score, and only above 0.5. Every method starts from the paired detections alone and is judged on the same
objects by mask IoU and Boundary IoU. ``peers.py`` compares more methods, on all sets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from baselines import load_refiner
from dataset import DATA, open_set
from measure import Result, measure
from methods import Coarse, Method, bilinear, grabcut, oracle, with_and_without
from rich.console import Console
from rich.table import Table

from transfiner_refine.errors import TransfinerError
from transfiner_refine.evaluation.report import WORSE_BY


def report(result: Result, title: str) -> Table:
    """The table that is printed."""
    table = Table(title=title, caption=f"worse: lost more than {WORSE_BY} of Boundary IoU; gains are over coarse")
    table.add_column("method")
    for heading in ("IoU", "gain", "boundary IoU", "gain", "worse", "s/instance"):
        table.add_column(heading, justify="right")
    for name, score in result.scores.items():
        figures = score.figures(result.scores["coarse"])
        cells = [f"{figures.mean_iou_refined:.3f}", "", f"{figures.mean_boundary_iou_refined:.3f}", "", "", ""]
        if name != "coarse":
            cells[1] = f"{figures.iou_gain:+.3f}"
            cells[3] = f"{figures.boundary_iou_gain:+.3f}"
            cells[4] = f"{figures.share_worse:.1%}"
            cells[5] = f"{score.seconds / figures.count:.3f}"
        table.add_row(name, *cells, style="bold" if name == "refined" else None)
    return table


def main(
    name: Annotated[str, typer.Argument(help="Set to run on, such as davis_dev or ecssd_validation.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    coarse: Annotated[
        Coarse, typer.Option(help="Start from the detector's masks, its 28×28 ones, or the ground truth.")
    ] = Coarse.detector,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos, spread evenly over the set.")] = None,
    dilation: Annotated[float, typer.Option(help="Boundary's width as a share of the image diagonal.")] = 0.02,
    with_refiner: Annotated[bool, typer.Option("--refiner/--no-refiner")] = True,
    with_grabcut: Annotated[bool, typer.Option("--grabcut/--no-grabcut", help="It takes minutes.")] = True,
    with_oracle: Annotated[bool, typer.Option("--oracle/--no-oracle")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Compare coarse, refined and otherwise improved masks with the ground truth of a set."""
    console = Console()
    try:
        samples = open_set(data, name, limit)
        methods: dict[str, Method] = {"bilinear": bilinear}
        if with_grabcut:
            methods["GrabCut"] = grabcut
        if with_refiner:
            methods |= with_and_without(load_refiner(model), coarse)
        if with_oracle:
            methods["oracle"] = oracle
        result = measure(samples, methods, coarse, dilation, console)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    count = result.scores["coarse"].count
    console.print(
        report(
            result, f"{name}, {coarse.value} masks: {count} instances of {len(samples)} photos, dilation {dilation:g}"
        )
    )
    if json_path is not None:
        figures = {"set": name, "coarse": coarse.value, "dilation": dilation, "methods": result.to_json()}
        json_path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
