"""The paper's ablations: each variant trained for the same budget on the same data, then measured on the same masks.

    python benchmarks/ablations.py runs/ablations --cache runs/cache --steps 150
    python benchmarks/ablations.py runs/ablations --cache runs/cache --steps 150 --only cues --only network

All variants share the embedded model's image encoder and, but for *guidance*, its incoherence detector, which stay as
they are. What corrects the nodes starts anew in each; its attention has the paper's key for each node, but where a row
says otherwise. Each is measured with the pixel head behind it and without, by itself. The folder keeps what was trained
and its figures, from which an interrupted command goes on; commands with different tables may share it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from baselines import load_refiner, with_network
from baselines.grids import GridDetector
from baselines.model import FRESH
from dataset import DATA, ECSSD_VALIDATION, open_set
from measure import counting, measure
from methods import Coarse, refined
from rich.console import Console
from rich.table import Table

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.coco import write_json_atomic
from transfiner_refine.data.crops import CropDataset
from transfiner_refine.data.object_cache import CropSource
from transfiner_refine.errors import InvalidInputError, TransfinerError
from transfiner_refine.evaluation.detector import DetectorCounts, detector_counts
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.finetune import OBJECTIVE
from transfiner_refine.training.loop import train
from transfiner_refine.training.schedule import TrainConfig

ANEW = (*FRESH, "transfiner.node_encoder.")
"""What starts anew in every variant."""

DETECTOR = "transfiner.incoherence_detector."
EVERY = RefineOptions(passes=1, segment=False, keep_if_gain_below=-1.0, keep_if_iou_below=0.0)
BY_ITSELF = replace(EVERY, align_pixels=False)
SETS = ("davis_dev", "ecssd_validation")
FIGURES = "figures.json"
PAPER = ("fine", "coarse", "context", "position")


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        network: One of ``baselines.NETWORKS``.
        overrides: Fields of the configuration that differ from the embedded model's.
        fresh_detector: Whether the incoherence detector starts anew, too, and is trained.
    """

    network: str = "transformer"
    overrides: dict[str, Any] = field(default_factory=dict)
    fresh_detector: bool = False


OURS = Variant()
TABLES: dict[str, dict[str, Variant]] = {
    "region": {
        "incoherent": OURS,
        "along the outline": Variant("boundary"),
        "full RoI, 28×28": Variant("transformer_28"),
        "without level 28": Variant("without_28"),
        "without level 56": Variant("without_56"),
        "without level 112": Variant("without_112"),
    },
    "cues": {
        "fine": Variant(overrides={"node_cues": ("fine",)}),
        "fine, coarse": Variant(overrides={"node_cues": ("fine", "coarse")}),
        "fine, coarse, context": Variant(overrides={"node_cues": ("fine", "coarse", "context")}),
        "the paper's four": Variant(overrides={"node_cues": PAPER}),
        "with guidance": OURS,
    },
    "depth": {
        "1 (28×28)": Variant(overrides={"depth": 1}),
        "2 (56×56)": Variant(overrides={"depth": 2}),
        "3 (112×112)": OURS,
    },
    "network": {
        "CNN, 28×28": Variant("cnn_28"),
        "MLP, 28×28": Variant("mlp_28"),
        "MLP, incoherent nodes": Variant("mlp"),
        "transformer, 3 layers, 4 heads": OURS,
        "transformer, 6 layers, 4 heads": Variant(overrides={"layers": 6}),
        "transformer, 3 layers, 8 heads": Variant(overrides={"heads": 8}),
    },
    "attention": {
        "non-local, 28×28": Variant("non_local_28"),
        "transformer, 28×28": Variant("transformer_28"),
        "transformer, 56×56": Variant("transformer_56"),
        "quadtree, 112×112": OURS,
        "quadtree, one key for each tree": Variant(overrides={"tree_keys": True}),
    },
    "levels": {
        "each level by itself": Variant(overrides={"joint_levels": False}),
        "without propagation": Variant(overrides={"propagate": False}),
        "joint, propagated": OURS,
    },
    "guidance": {
        "without lower-level guidance": Variant(overrides={"lower_level_guidance": False}, fresh_detector=True),
        "with it": Variant(fresh_detector=True),
    },
}
"""By the paper's tables 2, 4, 5, 6, 7, 8 and 3."""


@dataclass(frozen=True)
class Figures:
    """What a variant reached.

    Attributes:
        gains: Of IoU and Boundary IoU, and the share made worse, by set; every refinement accepted, by the network
            alone.
        aligned_gains: The same with the pixel head behind it.
        processor_seconds: For an instance, the image encoder included.
        gflops: Of the network for an instance, without the image encoder.
        peak_mb: Most memory that a call added, in megabytes; None where that is not known.
        recall: Of the incoherence detector, level by level; empty where all cells of a level are refined.
        accuracy: As recall.
    """

    gains: dict[str, list[float]]
    aligned_gains: dict[str, list[float]]
    processor_seconds: float
    gflops: float
    peak_mb: float | None
    recall: list[float]
    accuracy: list[float]


@dataclass(frozen=True)
class Budget:
    """What every variant gets.

    Attributes:
        steps: Steps of 16 objects.
        limit: Photos of each set to measure on.
        seed: Seed of everything random.
    """

    steps: int
    limit: int
    seed: int = 0


def make(variant: Variant, seed: int) -> RefinerModel:
    """The model of a variant, with its new weights drawn."""
    torch.manual_seed(seed)
    fresh = (*ANEW, DETECTOR) if variant.fresh_detector else ANEW
    overrides = {"tree_keys": False} | variant.overrides
    return with_network(load_refiner().model, variant.network, fresh, **overrides)


def train_variant(variant: Variant, folder: Path, data: Path, cache: Path, budget: Budget) -> Path:
    """Train one variant; returns the folder of its averaged weights at the end."""
    model = make(variant, budget.seed)
    sources = [CropSource(data / "ecssd", exclude=sorted(ECSSD_VALIDATION)), CropSource(data / "ccp")]
    side = ROOT_SIDE << (model.config.depth - 1)
    dataset = CropDataset(sources, cache, side=side, box_margin=model.config.box_margin, real_share=0.7)
    config = TrainConfig(
        steps=budget.steps,
        frozen_detector=not variant.fresh_detector,
        frozen_stages=5,
        ema=0.98,
        decay=0.5,
        validate_every=budget.steps,
        seed=budget.seed,
        workers=0,
    )
    places = count()  # the last weights are taken, not the best: no variant is helped by a choice
    result = train(
        model.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
        dataset,
        folder,
        config,
        OBJECTIVE,
        lambda _: {"score": float(next(places))},
    )
    return result.directory


def judge(refiner: Refiner, data: Path, limit: int, console: Console) -> Figures:
    """Measure one variant."""
    methods = {"by itself": refined(refiner, options=BY_ITSELF), "aligned": refined(refiner, options=EVERY)}
    gains: dict[str, dict[str, list[float]]] = {method: {} for method in methods}
    seconds, instances, peak = 0.0, 0, None
    for name in SETS:
        result = measure(open_set(data, name, limit), methods, Coarse.detector, 0.02, console, with_memory=True)
        for method in methods:
            figures = result.scores[method].figures(result.scores["coarse"])
            gains[method][name] = [figures.iou_gain, figures.boundary_iou_gain, figures.share_worse]
        aligned = result.scores["aligned"]
        seconds += aligned.processor_seconds
        instances += aligned.count
        peak = aligned.peak if peak is None else max(peak, aligned.peak or 0)
    samples = list(open_set(data, "ecssd_validation", 20))
    flops, number = 0, 0
    finds = not isinstance(refiner.model.transfiner.incoherence_detector, GridDetector)
    counts = [DetectorCounts()] * refiner.config.depth if finds else []
    options = RefineOptions(passes=1, keep_if_gain_below=-1.0, return_quadtree=finds)
    for sample in samples:
        with counting() as counter:
            out = refiner.refine(sample.image, boxes=sample.boxes, masks=sample.coarse, options=options)
        by_module = counter.get_flop_counts()
        flops += sum(by_module["Global"].values()) - sum(by_module["ImageEncoder"].values())
        number += len(sample.boxes)
        if finds:
            levels = detector_counts(out, torch.from_numpy(sample.truth))
            counts = [total + one for total, one in zip(counts, levels, strict=True)]
    return Figures(
        gains=gains["by itself"],
        aligned_gains=gains["aligned"],
        processor_seconds=seconds / instances,
        gflops=flops / number / 1e9,
        peak_mb=None if peak is None else peak / 1e6,
        recall=[level.recall for level in counts],
        accuracy=[level.accuracy for level in counts],
    )


def jobs(only: list[str]) -> Iterator[tuple[str, Variant]]:
    """Every variant once, by a name that tells its difference; many are rows of several tables."""
    seen = set()
    for table in only:
        for variant in TABLES[table].values():
            if (name := name_of(variant)) not in seen:
                seen.add(name)
                yield name, variant


def name_of(variant: Variant) -> str:
    """A folder's name for a variant."""
    parts = [variant.network, *(f"{name}={_plain(value)}" for name, value in variant.overrides.items())]
    return "_".join([*parts, *(["fresh_detector"] if variant.fresh_detector else [])])


def _plain(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


def known_figures(folder: Path, name: str, budget: Budget) -> Figures | None:
    """What a variant reached in an earlier command; None if it has still to be measured."""
    path = folder / name / FIGURES
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    if kept["budget"] != asdict(budget):
        raise InvalidInputError(f"expected the budget of {path}, {kept['budget']}, got another: name a new folder")
    return Figures(**kept["figures"])


def report(table: str, known: dict[str, Figures], steps: int) -> Table:
    """One table, of what is known."""
    printed = Table(title=f"{table}: {steps} steps of 16 objects each")
    printed.add_column("variant")
    sets = ("DAVIS", "worse", "ECSSD", "worse")
    headings = (*sets, *(f"{heading}, aligned" for heading in sets), "CPU s", "GFLOPs", "MB", "recall", "accuracy")
    for heading in headings:
        printed.add_column(heading, justify="right")
    for label, variant in TABLES[table].items():
        figures = known.get(name_of(variant))
        if figures is None:
            continue
        cells = []
        for iou, boundary, worse in (*figures.gains.values(), *figures.aligned_gains.values()):
            cells += [f"{iou:+.3f} / {boundary:+.3f}", f"{worse:.1%}"]
        cells += [f"{figures.processor_seconds:.3f}", f"{figures.gflops:.1f}"]
        cells += ["" if figures.peak_mb is None else f"{figures.peak_mb:.0f}"]
        cells += [" ".join(f"{100 * x:.0f}" for x in column) for column in (figures.recall, figures.accuracy)]
        printed.add_row(label, *cells)
    return printed


def main(
    folder: Annotated[Path, typer.Argument(help="Gets the models and their figures.")],
    cache: Annotated[Path, typer.Option(help="Folder for decoded objects.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    only: Annotated[list[str] | None, typer.Option(help=f"Tables, of {', '.join(TABLES)}.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 16 objects for every variant.")] = 1000,
    limit: Annotated[int, typer.Option(min=1, help="Photos of each set to measure on.")] = 60,
) -> None:
    """Train and measure the variants of the tables."""
    console = Console(width=240)
    budget = Budget(steps, limit)
    known = {}
    try:
        if unknown := set(only or []) - set(TABLES):
            raise InvalidInputError(f"expected tables among {sorted(TABLES)}, got {sorted(unknown)}")
        for name, variant in jobs(only or list(TABLES)):
            figures = known_figures(folder, name, budget)
            if figures is None:
                best = train_variant(variant, folder / name, data, cache, budget)
                figures = judge(load_refiner(best), data, limit, console)
                record = {"budget": asdict(budget), "figures": asdict(figures)}
                write_json_atomic(folder / name / FIGURES, record)
            known[name] = figures
            console.print(f"{name}: {asdict(figures)}", soft_wrap=True)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    for table in only or TABLES:
        console.print(report(table, known, steps))


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    np.seterr(all="raise", under="ignore")
    typer.run(main)
