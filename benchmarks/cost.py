"""Time and memory of a refiner and its peers, and of the same model computed densely.

    python benchmarks/cost.py

The scene is that of ``scaling.py``, enlarged or shrunk to each image size, and its objects with it. Times are of one
call, the least of a few. The image encoder is in the figures of the refiner among its peers, not in those of the
network alone. Peers work mask by mask: a few are timed, and the figure is theirs times the number of instances.
CascadePSP has random weights, which cost what trained ones do.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from cascade_psp import cascade_psp
from dataset import MatchedImage
from dense_reference import refine_densely, refine_sparsely
from measure import added_memory
from methods import Method, dense_crf, grabcut, guided_filter, is_installed, refined, with_and_without
from rich.console import Console
from rich.table import Table
from scaling import WIDTH, Scene, encode, make_scene
from torch import Tensor

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import MissingDependencyError, TransfinerError
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.transfiner import SelectNodes, above_threshold
from transfiner_refine.types import LevelNodes

COUNTS, SIZES = (1, 10, 100, 300), (640, 1200, 2048, 4096)
QUICK_COUNTS, QUICK_SIZES = (1, 10), (640, 1200)
COUNT_OF_SIZES = 10
"""Instances where the image size varies."""

SELECT = above_threshold(0.5)

WHOLE = 1e6
"""Surroundings that reach beyond any photo."""

SLOW = ("CascadePSP", "CascadePSP, global step")
MEGABYTE = 1e6
FILE_WIDTH = 140


@dataclass(frozen=True)
class Cost:
    """What one call takes.

    Attributes:
        seconds: On the clock.
        processor_seconds: That processors worked.
        peak: Bytes added to the process at its peak, the result included; None where that cannot be read.
    """

    seconds: float
    processor_seconds: float
    peak: int | None

    def times(self, factor: float) -> Cost:
        """The time of so many calls; their memory is that of one."""
        return replace(self, seconds=self.seconds * factor, processor_seconds=self.processor_seconds * factor)


def cost_of(call: Callable[[], object], repeats: int) -> Cost:
    """Least time of a few calls, and the memory of one more."""
    times = []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        call()
        times.append((time.process_time() - processor, time.perf_counter() - wall))
    peak = added_memory(call)
    processor, wall = min(times)
    return Cost(wall, processor, peak)


def resized(scene: Scene, width: int) -> Scene:
    """The scene in another size, with the same shape."""
    height = round(scene.image.shape[1] * width / scene.image.shape[2])
    image = F.interpolate(scene.image[None], (height, width), mode="bilinear", antialias=True)[0]
    masks = torch.stack([F.interpolate(m[None, None].byte(), (height, width))[0, 0].bool() for m in scene.masks])
    return Scene(image, scene.boxes * (width / scene.image.shape[2]), masks)


def as_sample(scene: Scene, count: int) -> MatchedImage:
    """The first instances of a scene, as the methods take them."""
    image = (scene.image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    masks, boxes = scene.masks[:count].numpy(), scene.boxes[:count].numpy()
    return MatchedImage("scene", image, masks, masks, boxes, np.zeros((count, ROOT_SIDE, ROOT_SIDE), np.float32))


def peer_methods(with_cascade: bool, console: Console) -> dict[str, Method]:
    """The methods that work mask by mask, as far as they are installed."""
    methods: dict[str, Method] = {
        "GrabCut, window": grabcut,
        "GrabCut, whole photo": partial(grabcut, surroundings=WHOLE),
        "guided filter": guided_filter,
    }
    if is_installed(dense_crf):
        methods["dense CRF"] = dense_crf
    else:
        console.print("dense CRF is left out: pip install pydensecrf2", style="yellow")
    if with_cascade:
        try:
            methods |= {name: cascade_psp(fast=name != SLOW[0]) for name in SLOW}
        except MissingDependencyError as error:
            console.print(f"CascadePSP is left out: {error}", style="yellow", markup=False)
    return methods


@torch.no_grad()
def deepened(model: RefinerModel) -> RefinerModel:
    """The model with one quadtree level more, for which the weights of its finest level serve again."""
    depth = model.config.depth
    deeper = RefinerModel(replace(model.config, depth=depth + 1)).eval()
    weights = dict(model.state_dict())
    for part in ("fusion", "finer_classifier"):
        for kind in ("weight", "bias"):
            key = f"transfiner.incoherence_detector.{part}.{{}}.{kind}"
            weights[key.format(depth - 1)] = weights[key.format(depth - 2)]
    if model.config.level_embedding:
        rows = weights["transfiner.node_encoder.level.weight"]
        weights["transfiner.node_encoder.level.weight"] = torch.cat([rows, rows[-1:]])
    deeper.load_state_dict(weights)
    return deeper


def peer_costs(
    refiner: Refiner, methods: dict[str, Method], scene: Scene, counts: tuple[int, ...], singles: int, repeats: int
) -> dict[str, dict[int, Cost]]:
    """Cost of every method at every number of instances."""
    ways = with_and_without(refiner)
    ways["refined, one pass, no segmenter"] = refined(refiner, options=RefineOptions(passes=1, segment=False))
    ways["refined"](as_sample(scene, 1))  # the first call of a library is not its speed
    costs = {
        name: {n: cost_of(partial(refine, as_sample(scene, n)), repeats) for n in counts}
        for name, refine in ways.items()
    }
    for name, method in methods.items():
        timed = 1 if name in SLOW else min(singles, max(counts))
        once = cost_of(partial(method, as_sample(scene, timed)), 1 if name in SLOW else repeats)
        costs[name] = {n: once.times(n / timed) for n in counts}
    return costs


class Network:
    """A model's network on the instances of a scene: what comes before it is done, what comes after it is left.

    Args:
        refiner: Its image encoder encodes the scene.
        scene: Image and instances.
        model: The network; None takes the refiner's own.
    """

    def __init__(self, refiner: Refiner, scene: Scene, model: RefinerModel | None = None):
        self.model = refiner.model if model is None else model
        self.config = self.model.config
        self.features = encode(refiner, scene.image)
        self.rois = expand_boxes(scene.boxes, self.config.box_margin)
        self.coarse = crop_masks(scene.masks, self.rois, ROOT_SIDE << (self.config.depth - 1))

    def __call__(self, refine: Callable[..., Tensor], count: int, select: SelectNodes = SELECT) -> Tensor:
        """Refine the first ``count`` instances, sparsely or densely: ``(R, S, S)`` probabilities."""
        image = torch.zeros(count, dtype=torch.long)
        arguments = (self.features, self.rois[:count], image, self.coarse[:count])
        return refine(self.model.transfiner, *arguments, self.config.depth, select)


class NodeChoice:
    """The nodes that one computation chose, for another to refine the same.

    A node at the threshold is chosen by one computation and, within rounding, not by the next; what they then make of
    it and of its neighbours can't be compared.

    Args:
        count: RoIs.
        depth: Levels.

    Attributes:
        strayed: Nodes on whose choice the computations differ.
    """

    def __init__(self, count: int, depth: int):
        self.strayed = 0
        self._chosen = [torch.zeros((count, ROOT_SIDE << k, ROOT_SIDE << k), dtype=torch.bool) for k in range(depth)]

    def selector(self, decides: bool) -> SelectNodes:
        """Selects nodes in calls that go over the RoIs in order, by incoherence or, afterwards, the same again."""
        start = after = 0  # the call's RoIs

        def select(level: int, candidates: LevelNodes) -> Tensor:
            nonlocal start, after
            if level == 0:  # every cell is a candidate
                start, after = after, after + len(candidates) // ROOT_SIDE**2
            cells = self._chosen[level]
            place = (start + candidates.roi, candidates.row, candidates.col)
            keep = SELECT(level, candidates)
            if decides:
                cells[place] = keep
            self.strayed += int((keep != cells[place]).sum())
            return cells[place]

        return select


DENSE = {"dense, pooled together": refine_densely, "dense, pooled one by one": partial(refine_densely, at_once=1)}


def network_costs(
    network: Network, counts: tuple[int, ...], repeats: int
) -> tuple[dict[str, dict[int, Cost]], dict[str, tuple[float, int]]]:
    """Cost of the sparse and the dense network; largest difference on the same nodes, and nodes chosen differently."""
    ways = {"sparse": refine_sparsely, **DENSE}
    costs: dict[str, dict[int, Cost]] = {name: {} for name in ways}
    differences: dict[str, tuple[float, int]] = {name: (0.0, 0) for name in DENSE}
    network(refine_sparsely, 1)
    for count in counts:
        choice = NodeChoice(count, network.config.depth)
        expected = network(refine_sparsely, count, choice.selector(decides=True))
        for name, refine in ways.items():
            costs[name][count] = cost_of(partial(network, refine, count), repeats)
        for name, refine in DENSE.items():
            choice.strayed = 0
            difference = float((network(refine, count, choice.selector(decides=False)) - expected).abs().max())
            differences[name] = (max(differences[name][0], difference), differences[name][1] + choice.strayed)
    return costs, differences


def ratios(network: Network, deeper: Network, count: int, repeats: int) -> dict[str, float]:
    """How the sparse network's processor time grows."""

    def seconds(net: Network, instances: int) -> float:
        return cost_of(partial(net, refine_sparsely, instances), repeats).processor_seconds

    half, one, deep = seconds(network, count // 2), seconds(network, count), seconds(deeper, count)
    sides = [ROOT_SIDE << (net.config.depth - 1) for net in (network, deeper)]
    return {f"{count // 2} to {count} instances": one / half, f"{sides[0]} to {sides[1]} cells": deep / one}


def report(title: str, costs: dict[str, dict[int, Cost]], what: str) -> Table:
    """Processor seconds and peak memory of every method, and its time over the first method's."""
    table = Table(title=title, caption=f"processor seconds (times those of the first row), peak MB; by {what}")
    table.add_column("method")
    first = next(iter(costs.values()))
    for column in first:
        table.add_column(str(column), justify="right")
    for name, row in costs.items():
        cells = []
        for column, cost in row.items():
            times = cost.processor_seconds / first[column].processor_seconds
            memory = "" if cost.peak is None else f", {cost.peak / MEGABYTE:.0f} MB"
            cells.append(f"{cost.processor_seconds:.2f} ({times:.2g}×){memory}")
        table.add_row(name, *cells)
    return table


def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few instances, small images, one call each.")] = False,
    count: Annotated[list[int] | None, typer.Option(help="Instances on 1200×800 pixels.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Widths of the image, with 10 instances.")] = None,
    singles: Annotated[int, typer.Option(min=1, help="Masks on which a peer is timed.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of which the fastest counts.")] = 3,
    with_peers: Annotated[bool, typer.Option("--peers/--no-peers")] = True,
    with_cascade: Annotated[bool, typer.Option("--cascadepsp/--no-cascadepsp", help="It takes minutes.")] = True,
    with_network: Annotated[bool, typer.Option("--network/--no-network", help="Sparse against dense.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Print cost against the number of instances and the size of the image."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    torch.set_flush_denormal(True)
    counts = tuple(count or (QUICK_COUNTS if quick else COUNTS))
    sizes = tuple(size or (QUICK_SIZES if quick else SIZES))
    repeats = 1 if quick else repeats
    threads = f"{torch.get_num_threads()} threads"
    record: dict = {"threads": torch.get_num_threads()}
    try:
        refiner = Refiner.from_pretrained(model)
        if with_network:
            scene = make_scene(max(counts))
            network, deeper = Network(refiner, scene), Network(refiner, scene, deepened(refiner.model))
            costs, differences = network_costs(network, counts, repeats)
            console.print(report(f"The network on features at hand, {threads}", costs, "instances"))
            for name, (difference, strayed) in differences.items():
                console.print(
                    f"{name}: largest difference of a probability {difference:.1e} on the same nodes; by itself it "
                    f"chooses {strayed} otherwise"
                )
            grown = ratios(network, deeper, min(100, max(counts)), repeats)
            console.print(", ".join(f"{name}: {value:.2f}×" for name, value in grown.items()))
            record["network"] = {name: as_json(row) for name, row in costs.items()}
            record |= {"differences": {name: value for name, (value, _) in differences.items()}, "growth": grown}
            del network, deeper
        if with_peers:
            methods = peer_methods(with_cascade, console)
            costs = peer_costs(refiner, methods, make_scene(max(counts)), counts, singles, repeats)
            console.print(report(f"Masks of a photo of {WIDTH} pixels' width, {threads}", costs, "instances"))
            record["instances"] = {name: as_json(row) for name, row in costs.items()}
            by_size: dict[str, dict[int, Cost]] = {}
            for width in sizes:
                scene = resized(make_scene(COUNT_OF_SIZES), width)
                for name, row in peer_costs(refiner, methods, scene, (COUNT_OF_SIZES,), singles, repeats).items():
                    by_size.setdefault(name, {})[width] = row[COUNT_OF_SIZES]
            console.print(report(f"{COUNT_OF_SIZES} masks, {threads}", by_size, "width of the photo"))
            record["sizes"] = {name: as_json(row) for name, row in by_size.items()}
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def as_json(row: dict[int, Cost]) -> dict[str, dict]:
    """Costs by column."""
    return {str(column): asdict(cost) for column, cost in row.items()}


if __name__ == "__main__":
    typer.run(main)
