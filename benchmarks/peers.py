"""A refiner beside what else improves masks: quality, time and memory, in one run on the same masks.

    python benchmarks/peers.py

Each set is measured from three kinds of coarse masks: a detector's, the same detector's 28×28 probabilities, and the
ground truth, which can only be harmed. How masks are paired and judged is said in ``quality.py``. A method whose
package is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from baselines import load_refiner
from cascade_psp import cascade_psp
from dataset import DATA, open_set
from measure import SIZES, Result, measure
from methods import Coarse, Method, bilinear, dense_crf, grabcut, guided_filter, is_installed, oracle, with_and_without
from rich.console import Console
from rich.table import Table

from transfiner_refine.errors import InvalidInputError, TransfinerError
from transfiner_refine.evaluation.report import WORSE_BY

SETS = ("davis_dev", "ecssd_validation", "pennfudan", "coco_train")
UNTRAINED: dict[str, Method] = {
    "bilinear": bilinear,
    "guided filter": guided_filter,
    "dense CRF": dense_crf,
    "GrabCut": grabcut,
    "oracle": oracle,
}
MEGABYTE = 1e6

FILE_WIDTH = 140
"""Characters of a line where the output is not a terminal."""


def available(skipped: list[str], console: Console) -> dict[str, Method]:
    """The methods without training that are wanted and installed."""
    if unknown := set(skipped) - set(UNTRAINED):
        raise InvalidInputError(f"expected methods to skip among {list(UNTRAINED)}, got {sorted(unknown)}")
    wanted = {name: method for name, method in UNTRAINED.items() if name not in skipped}
    for name in [name for name, method in wanted.items() if not is_installed(method)]:
        console.print(f"{name} is left out: pip install pydensecrf2", style="yellow")
        del wanted[name]
    return wanted


def report(result: Result, title: str) -> Table:
    """The table of one set and one kind of coarse masks."""
    coarse = result.scores["coarse"]
    table = Table(
        title=title,
        caption=f"gains over coarse; worse: lost more than {WORSE_BY} of Boundary IoU; sizes: gain of Boundary IoU",
    )
    table.add_column("method")
    sizes = [f"{size} ({np.count_nonzero(result.of_size(size))})" for size in SIZES]
    for heading in ("IoU", "boundary IoU", "worse", *sizes, "s/instance", "CPU s/instance", "peak MB"):
        table.add_column(heading, justify="right")
    for name, score in result.scores.items():
        figures = score.figures(coarse)
        by_size = [score.figures(coarse, result.of_size(size)) for size in SIZES]
        if name == "coarse":
            values = [figures.mean_iou_coarse, figures.mean_boundary_iou_coarse]
            cells = [f"{value:.3f}" for value in values]
            cells += ["", *(f"{x.mean_boundary_iou_coarse:.3f}" if x.count else "" for x in by_size), "", "", ""]
        else:
            cells = [f"{figures.iou_gain:+.4f}", f"{figures.boundary_iou_gain:+.4f}", f"{figures.share_worse:.1%}"]
            cells += [f"{x.boundary_iou_gain:+.4f}" if x.count else "" for x in by_size]
            cells += [f"{seconds / figures.count:.3f}" for seconds in (score.seconds, score.processor_seconds)]
            cells.append("" if score.peak is None else f"{score.peak / MEGABYTE:.0f}")
        table.add_row(name, *cells, style="bold" if name == "refined" else None)
    return table


def main(
    sets: Annotated[list[str] | None, typer.Argument(help=f"Sets; {', '.join(SETS)} if left out.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of further refiners or baselines, each a row of its own.")
    ] = None,
    refiner: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    cascade: Annotated[
        Path | None, typer.Option("--cascadepsp", help="Folder with CascadePSP's weights, which takes hours.")
    ] = None,
    coarse: Annotated[list[Coarse] | None, typer.Option(help="Kinds of coarse masks; all if left out.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(UNTRAINED)}.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos of each set, spread evenly over it.")] = None,
    dilation: Annotated[float, typer.Option(help="Boundary's width as a share of the image diagonal.")] = 0.02,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Print one table for each set and kind of coarse masks."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    torch.set_flush_denormal(True)
    record: dict = {"dilation": dilation, "limit": limit, "threads": torch.get_num_threads(), "sets": {}}
    try:
        untrained = available(skip or [], console)
        refiners = {"refined": load_refiner(refiner)}
        for entry in model or ():
            name, equals, folder = entry.partition("=")
            if not equals:
                raise InvalidInputError(f"expected --model NAME=FOLDER, got {entry!r}")
            refiners[name] = load_refiner(folder)
        bound = {name: method for name, method in untrained.items() if name == "oracle"}
        if cascade is not None:
            untrained["CascadePSP"] = cascade_psp(cascade)
        for name in sets or SETS:
            samples = open_set(data, name, limit)
            record["sets"][name] = {"photos": len(samples)}
            for kind in coarse or Coarse:
                methods = {label: method for label, method in untrained.items() if label not in bound}
                for label, one in refiners.items():
                    methods |= with_and_without(one, kind, label)
                methods |= bound
                result = measure(samples, methods, kind, dilation, console, with_memory=True)
                record["sets"][name][kind.value] = result.to_json()
                count = result.scores["coarse"].count
                console.print(report(result, f"{name}, {kind.value} masks: {count} instances"))
                if json_path is not None:  # after each table, since a run may take an hour
                    json_path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
