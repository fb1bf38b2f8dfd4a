"""How well refiners find incoherent cells, level by level (Mask Transfiner, Table 3).

    python benchmarks/detector.py davis_dev
    python benchmarks/detector.py davis_dev --model runs/guided/best --model runs/unguided/best

The effect of lower-level guidance is the difference between two refiners that were trained with and without it
(``lower_level_guidance`` in their configuration, shown in the table) and alike in all else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from dataset import DATA, MatchedSet
from rich.console import Console
from rich.progress import track
from rich.table import Table

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import TransfinerError
from transfiner_refine.evaluation.detector import DetectorCounts, detector_counts

EMBEDDED = "embedded"

SHARES: dict[str, Callable[[DetectorCounts], float]] = {
    "incoherent": lambda counts: counts.incoherent / counts.cells,
    "judged": lambda counts: counts.judged / counts.cells,
    "recall": lambda counts: counts.recall,
    "precision": lambda counts: counts.precision,
    "accuracy": lambda counts: counts.accuracy,
}

CAPTION = (
    "incoherent, judged: of all cells. recall: of the incoherent cells, those found. precision: of the nodes, those "
    "incoherent. accuracy: of the judged cells, those told rightly."
)


def measure(
    samples: MatchedSet, refiners: dict[str, Refiner], options: RefineOptions, console: Console
) -> dict[str, list[DetectorCounts]]:
    """Count the cells of every refiner, level by level, over all photos."""
    counts = {name: [DetectorCounts()] * refiner.config.depth for name, refiner in refiners.items()}
    for sample in track(samples, "Refining", total=len(samples), console=console, transient=True):
        truth = torch.from_numpy(sample.truth)
        for name, refiner in refiners.items():
            refined = refiner.refine(sample.image, boxes=sample.boxes, masks=sample.coarse, options=options)
            levels = detector_counts(refined, truth)
            counts[name] = [total + one for total, one in zip(counts[name], levels, strict=True)]
    return counts


def report(refiners: dict[str, Refiner], counts: dict[str, list[DetectorCounts]], title: str) -> Table:
    """The table that is printed: figures of each level in rows, refiners side by side."""
    table = Table(title=title, caption=CAPTION)
    table.add_column("cells")
    table.add_column("share")
    for name, refiner in refiners.items():
        guidance = "with" if refiner.config.lower_level_guidance else "without"
        table.add_column(f"{name}\n{guidance} guidance", justify="right")
    for level in range(max(map(len, counts.values()))):
        side = ROOT_SIDE << level
        reached = [levels[level] if level < len(levels) else DetectorCounts() for levels in counts.values()]
        for heading, share in SHARES.items():
            cells = f"{side}×{side}" if heading == next(iter(SHARES)) else ""
            table.add_row(cells, heading, *(f"{share(x):.1%}" if x.cells else "" for x in reached))
        table.add_section()
    return table


def main(
    name: Annotated[str, typer.Argument(help="Set to run on, such as davis_dev.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Folder or Hub id; may be repeated.", show_default="the embedded model")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    only: Annotated[
        Path | None, typer.Option(help="Text file of photos' names, one a line.", show_default="all photos")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos, spread evenly over the set.")] = None,
    threshold: Annotated[float, typer.Option(help="Probability above which a cell is a node.")] = 0.5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the counts here, too.")] = None,
) -> None:
    """Measure the incoherence detectors of refiners on a set."""
    console = Console()
    try:
        samples = MatchedSet(data / name, None if only else limit)
        if only is not None:
            wanted = set(only.read_text(encoding="utf-8").split())
            samples.images = [image for image in samples.images if image["file_name"] in wanted][:limit]
        refiners = {path: Refiner.from_pretrained(path) for path in model or []}
        if not refiners:
            refiners = {EMBEDDED: Refiner.from_pretrained()}
        options = RefineOptions(passes=1, incoherence_threshold=threshold, return_quadtree=True)
        counts = measure(samples, refiners, options, console)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    instances = next(iter(counts.values()))[0].cells // ROOT_SIDE**2
    console.print(report(refiners, counts, f"{name}: {instances} instances of {len(samples)} photos"))
    if json_path is not None:
        figures = {
            path: {
                "lower_level_guidance": refiners[path].config.lower_level_guidance,
                "levels": [
                    {**asdict(x), "recall": x.recall, "precision": x.precision, "accuracy": x.accuracy} for x in levels
                ],
            }
            for path, levels in counts.items()
        }
        document = {"set": name, "instances": instances, "threshold": threshold, "models": figures}
        json_path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
