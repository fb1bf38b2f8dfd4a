"""The command that writes a refiner as graphs for other runtimes, for :mod:`transfiner_refine.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from transfiner_refine.commands.options import Depth, Model
from transfiner_refine.config import RefineOptions


def export(
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    model: Model = None,
    max_nodes: Annotated[
        list[int] | None,
        typer.Option(
            help="Nodes of an instance at every level; given once for each level, at that one.",
            show_default="what real outlines need",
        ),
    ] = None,
    depth: Depth = None,
    segment: Annotated[
        bool, typer.Option("--segment/--no-segment", help="Export the segmenter, too, where the model has one.")
    ] = True,
    incoherence_threshold: Annotated[
        float, typer.Option(help="Probability above which a cell is an incoherent node.")
    ] = RefineOptions().incoherence_threshold,
    opset: Annotated[
        int | None, typer.Option(help="Version of ONNX's operators.", show_default="the one that is fastest")
    ] = None,
    format: Annotated[Literal["onnx", "pt2"], typer.Option(help="ONNX, or programs of torch.export.")] = "onnx",
) -> None:
    """Write a refiner as ONNX, with a runtime that needs no torch."""
    from transfiner_refine.export.programs import OPSET, export_onnx, export_program
    from transfiner_refine.refiner import Refiner

    options = RefineOptions(depth=depth, segment=segment, incoherence_threshold=incoherence_threshold)
    budget = max_nodes[0] if max_nodes and len(max_nodes) == 1 else max_nodes or None
    refiner = Refiner.from_pretrained(model)
    if format == "onnx":
        export_onnx(refiner, output, max_nodes=budget, options=options, opset=OPSET if opset is None else opset)
    else:
        export_program(refiner, max_nodes=budget, options=options).save(output)
    print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir() if path.is_file()))}")
