"""How the time of a refinement grows with nodes, instances, depth and image size: measured, fitted and drawn.

    python benchmarks/growth.py --plot docs/images/growth.png

The scene is that of ``scaling.py``. Nodes, instances and depth are those of the network alone, on features at hand; the
image size is that of whole calls with 10 instances, image encoder included. Each series is fitted by a straight line,
seconds over what varies, and by a power of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from cost import COUNT_OF_SIZES, FILE_WIDTH, Network, as_sample, cost_of, deepened, resized
from dense_reference import refine_sparsely
from methods import refined
from rich.console import Console
from rich.table import Table
from scaling import WIDTH, make_scene

from transfiner_refine import Refiner
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import TransfinerError
from transfiner_refine.modeling.transfiner import SelectNodes, above_threshold
from transfiner_refine.types import LevelNodes

INSTANCES = (1, 3, 10, 30, 100)
NODE_LIMITS = (25, 50, 100, 200, 400, 800)
"""Nodes kept per instance and level."""

SIZES = (640, 1200, 2048, 4096)
INSTANCES_OF_NODES = 30
"""Instances where nodes or depth vary."""


@dataclass
class Series:
    """Seconds against one thing that varies.

    Attributes:
        what: What varies.
        x: Its values.
        seconds: Processor seconds at each.
    """

    what: str
    x: list[float]
    seconds: list[float]

    def line(self) -> tuple[float, float, float]:
        """Offset and slope of the straight line, fitted to relative errors, and the largest of these."""
        x, y = np.array(self.x), np.array(self.seconds)
        system = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
        offset, slope = np.linalg.lstsq(system, np.ones_like(y), rcond=None)[0]
        return float(offset), float(slope), float(abs((offset + slope * x) / y - 1).max())

    def power(self) -> float:
        """Exponent of the power of what varies that seconds follow."""
        return float(np.polyfit(np.log(self.x), np.log(self.seconds), 1)[0])


def counting(select: SelectNodes) -> tuple[SelectNodes, list[int]]:
    """The same choice of nodes, and a list that gets how many of each level were chosen."""
    counts: list[int] = []

    def counted(level: int, candidates: LevelNodes) -> torch.Tensor:
        keep = select(level, candidates)
        counts.append(int(keep.sum()))
        return keep

    return counted, counts


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Processor seconds of a call, the least of a few."""
    return cost_of(call, repeats).processor_seconds


def measure(refiner: Refiner, repeats: int) -> list[Series]:
    """All four series."""
    scene = make_scene(max(INSTANCES))
    network = Network(refiner, scene)
    network(refine_sparsely, 1)  # the first call of a library is not its speed

    nodes = Series("nodes", [], [])
    for limit in NODE_LIMITS:
        select = above_threshold(0.5, limit)
        counted, counts = counting(select)
        network(refine_sparsely, INSTANCES_OF_NODES, counted)
        nodes.x.append(float(sum(counts)))
        nodes.seconds.append(seconds_of(partial(network, refine_sparsely, INSTANCES_OF_NODES, select), repeats))

    instances = Series("instances", [float(n) for n in INSTANCES], [])
    for count in INSTANCES:
        instances.seconds.append(seconds_of(partial(network, refine_sparsely, count), repeats))

    depth = Series("cells a side", [], [])
    deeper = Network(refiner, scene, deepened(refiner.model))
    for levels in range(1, deeper.config.depth + 1):
        # Of the deeper model at every depth, whose levels are those of the model itself as far as it has them.
        limited = above_threshold(0.5, depth=torch.full((INSTANCES_OF_NODES,), levels))
        depth.x.append(float(ROOT_SIDE << (levels - 1)))
        depth.seconds.append(seconds_of(partial(deeper, refine_sparsely, INSTANCES_OF_NODES, limited), repeats))

    size = Series("megapixels", [], [])
    call = refined(refiner)
    for width in SIZES:
        photo = resized(make_scene(COUNT_OF_SIZES), width)
        size.x.append(photo.image.shape[1] * photo.image.shape[2] / 1e6)
        size.seconds.append(seconds_of(partial(call, as_sample(photo, COUNT_OF_SIZES)), repeats))
    return [nodes, instances, depth, size]


def report(series: list[Series]) -> Table:
    """Seconds and fits."""
    title = f"Processor seconds, {torch.get_num_threads()} threads; photo of {WIDTH} pixels' width"
    table = Table(title=title, caption="line: offset + slope · x, with its largest relative error; power: of x")
    for heading in ("what varies", "seconds", "line", "error", "power"):
        table.add_column(heading)
    for one in series:
        points = ", ".join(f"{x:,.3g}: {y:.2f}" for x, y in zip(one.x, one.seconds, strict=True))
        offset, slope, error = one.line()
        table.add_row(one.what, points, f"{offset:.3f} + {slope:.3g} x", f"{error:.0%}", f"{one.power():.2f}")
    return table


def plot(series: list[Series], path: Path) -> None:
    """Draw points and lines."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(series), figsize=(3.2 * len(series), 3), layout="constrained")
    for axis, one in zip(axes, series, strict=True):
        offset, slope, _ = one.line()
        x = np.linspace(0, max(one.x), 50)
        axis.plot(x, offset + slope * x, color="tab:grey", linewidth=1)
        axis.plot(one.x, one.seconds, "o", color="tab:blue")
        axis.set_xlabel(f"{one.what} (power {one.power():.2f})")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("processor seconds")
    figure.savefig(path, dpi=110)


def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of which the fastest counts.")] = 3,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the series to this file.")] = None,
) -> None:
    """Print how time grows with what varies."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    torch.set_flush_denormal(True)
    try:
        series = measure(Refiner.from_pretrained(model), repeats)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(report(series))
    if picture is not None:
        plot(series, picture)


if __name__ == "__main__":
    typer.run(main)
