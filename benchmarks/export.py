"""The exported graphs beside the refiner that they were exported from: do they agree, and what do they cost?

    python benchmarks/export.py davis_dev

All refine the same masks, each instance encoded as a crop: the refiner itself, onnxruntime, and the refiner with its
image encoder and sequence encoder under ``torch.compile``. The first photo warms each of them up and is not timed.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from dataset import DATA, MatchedImage, open_set
from measure import Result, measure
from methods import Coarse, Method, refined
from rich.console import Console
from rich.table import Table

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.errors import TransfinerError
from transfiner_refine.export import OnnxRefiner, export_onnx
from transfiner_refine.export.programs import OPSET

EAGER = "eager"


def compiled(refiner: Refiner) -> Refiner:
    """A copy whose image encoder's backbone and sequence encoder's layers are compiled, for any number of instances."""
    refiner = Refiner(copy.deepcopy(refiner.model))
    hot = list(refiner.model.transfiner.sequence_encoder.layers)
    if refiner.model.image_encoder is not None:
        hot.append(refiner.model.image_encoder.backbone)
    for module in hot:
        module.compile(dynamic=True)
    return refiner


def on_onnxruntime(refiner: OnnxRefiner) -> Method:
    """The exported graphs as a method."""

    def refine(sample: MatchedImage):
        return refiner.refine(sample.image, boxes=sample.boxes, masks=sample.coarse).masks

    return refine


def report(result: Result, title: str) -> Table:
    """The table that is printed."""
    table = Table(title=title, caption="seconds of one instance: on the clock, and of the processor")
    table.add_column("method")
    for heading in ("IoU", "boundary IoU", "from eager", "s/instance", "processor s"):
        table.add_column(heading, justify="right")
    coarse = result.scores["coarse"]
    expected = result.scores[EAGER].figures(coarse).mean_boundary_iou_refined
    for name, score in result.scores.items():
        figures = score.figures(coarse)
        cells = [f"{figures.mean_iou_refined:.4f}", f"{figures.mean_boundary_iou_refined:.4f}"]
        if name != "coarse":
            cells.append(f"{figures.mean_boundary_iou_refined - expected:+.4f}")
            cells += [f"{seconds / score.count:.3f}" for seconds in (score.seconds, score.processor_seconds)]
        table.add_row(name, *cells)
    return table


def main(
    name: Annotated[str, typer.Argument(help="Set to run on, such as davis_dev or ecssd_validation.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos, spread evenly over the set.")] = None,
    max_nodes: Annotated[
        int | None, typer.Option(help="Nodes per instance and level of all methods.", show_default="the export's own")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each method.")] = 1,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = OPSET,
    exported: Annotated[
        Path | None, typer.Option(help="Folder of an export of this model with these options, instead of a new one.")
    ] = None,
    with_compile: Annotated[bool, typer.Option("--compile/--no-compile", help="It needs a C++ compiler.")] = True,
) -> None:
    """Compare the refiner, onnxruntime and torch.compile in quality and time."""
    console = Console()
    torch.set_num_threads(threads)
    try:
        refiner = Refiner.from_pretrained(model)
        options = RefineOptions(max_nodes=max_nodes, encode="crops")
        with tempfile.TemporaryDirectory() as folder:
            if exported is None:
                exported = export_onnx(refiner, folder, max_nodes=max_nodes, opset=opset)
            methods: dict[str, Method] = {
                EAGER: refined(refiner, options=options),
                "onnxruntime": on_onnxruntime(OnnxRefiner(exported, threads=threads)),
            }
            if with_compile:
                methods["torch.compile"] = refined(compiled(refiner), options=options)
            result = measure(open_set(data, name, limit), methods, Coarse.detector, 0.02, console)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    count, wanted = result.scores["coarse"].count, "its own" if max_nodes is None else max_nodes
    console.print(report(result, f"{name}: {count} instances, {threads} threads, node budget {wanted}"))


if __name__ == "__main__":
    typer.run(main)
