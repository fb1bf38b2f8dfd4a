"""The bulk command on many images: memory over time, speed beside the same work without files, kill and resume.

    python benchmarks/bulk.py
    python benchmarks/bulk.py --images 60 --picture outputs/memory.png

The photos of a set are repeated, as links, until there are as many as asked for. The command runs three times: whole,
with its memory sampled; killed at a random moment; and resumed, to the same bytes. In between, the same images are
refined from memory with the same options: reading them is not counted.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from dataset import DATA
from rich.console import Console
from rich.table import Table

from transfiner_refine import RefineOptions
from transfiner_refine.bulk.coco_results import CocoResults
from transfiner_refine.bulk.work import Work
from transfiner_refine.data.coco import group_by_image, load_image_index, load_results
from transfiner_refine.errors import TransfinerError

MEGABYTE = 1e6
COMMAND = "from transfiner_refine.cli import main; main()"
SHARD_IMAGES = 16
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "bulk_memory.png"


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Attributes:
        seconds: Times of the samples since the start.
        memory: Resident bytes at these times.
        killed: Whether it was killed.
    """

    seconds: list[float]
    memory: list[int]
    killed: bool

    def growth(self) -> float:
        """Bytes of the mean of the last tenth over that of the second, when everything is loaded."""
        tenth = max(1, len(self.memory) // 10)
        early, late = self.memory[tenth : 2 * tenth] or self.memory, self.memory[-tenth:]
        return sum(late) / len(late) - sum(early) / len(early)


def repeat_set(folder: Path, count: int, target: Path) -> None:
    """Write ``photos/`` and ``dets.json`` of ``count`` images, repeating those of a set with detections.

    Args:
        folder: ``images/``, ``annotations.json`` and ``detections.json``.
        count: Images.
        target: Existing folder.
    """
    results = load_results(folder / "detections.json")
    names = load_image_index(folder / "annotations.json")
    groups = list(group_by_image(results).items())
    # A set may come sorted, as by the number of objects: memory would seem to grow with time.
    random.Random(0).shuffle(groups)
    (target / "photos").mkdir()
    entries = []
    for number in range(count):
        image_id, positions = groups[number % len(groups)]
        source = (folder / "images" / names[image_id]).resolve()
        (target / "photos" / f"{number:012}{source.suffix}").symlink_to(source)
        entries += [{**results[position], "image_id": number} for position in positions]
    (target / "dets.json").write_text(json.dumps(entries))


def run_command(folder: Path, output: str, threads: int, kill_after: float | None = None, every: float = 0.2) -> Run:
    """Run the command on a set of :func:`repeat_set`, and sample its memory.

    Args:
        folder: The set.
        output: Name of the output in it; the summary is beside it.
        threads: Threads of torch.
        kill_after: Seconds after the first finished shard until it is killed; None lets it end.
        every: Seconds between samples.
    """
    words = ["coco", "--images", folder / "photos", "--predictions", folder / "dets.json", "--output", folder / output]
    words += ["--summary", folder / f"{output}.summary", "--threads", threads, "--shard-images", SHARD_IMAGES]
    start = time.perf_counter()
    deadline = None
    seconds: list[float] = []
    memory: list[int] = []
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, words)], stdout=log, stderr=log)
        while process.poll() is None:
            seconds.append(time.perf_counter() - start)
            memory.append(resident(process.pid))
            if kill_after is not None and deadline is None and any((folder / f"{output}.parts").glob("shard_*")):
                deadline = time.perf_counter() + kill_after
            if deadline is not None and time.perf_counter() > deadline:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return Run(seconds, memory, killed=True)
            time.sleep(every)
    if process.returncode:
        raise typer.BadParameter(f"expected the command to end well, got:\n{(folder / 'log.txt').read_text()}")
    return Run(seconds, memory, killed=False)


def resident(process: int) -> int:
    """Bytes of memory that a process holds; 0 once it is gone."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def seconds_from_memory(folder: Path, threads: int, at_once: int = 32) -> float:
    """Refine the set from memory, in groups that are read before the clock starts; returns the seconds of refining."""
    source = CocoResults(folder / "photos", folder / "dets.json")
    options = RefineOptions()
    refiner = Work(source, options).load_refiner()
    torch.set_num_threads(threads)

    def groups() -> Iterator[list]:
        numbers = iter(range(len(source)))
        while group := [source.load(number) for number in islice(numbers, at_once)]:
            yield group

    total = 0.0
    for group in groups():
        start = time.perf_counter()
        for loaded in group:
            refiner.refine(loaded.photo, boxes=loaded.coarse.boxes, masks=loaded.coarse.masks, options=options)
        total += time.perf_counter() - start
    return total


def draw_memory(run: Run, path: Path, images: int) -> None:
    """Plot memory over time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(run.seconds, [value / MEGABYTE for value in run.memory])
    axes.set(xlabel="seconds", ylabel="resident memory, MB", title=f"transfiner-refine coco, {images:,} images")
    axes.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(
    name: Annotated[str, typer.Argument(help="Name of the set.")] = "ecssd",
    images: Annotated[int, typer.Option(min=2, help="Images, repeating those of the set.")] = 2000,
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the moment at which the run is killed.")] = 0,
    picture: Annotated[Path, typer.Option(help="Where memory is drawn.")] = PICTURE,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure the bulk command: memory, speed, and whether a killed run comes to the same bytes."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="bulk-"))
    try:
        repeat_set(data / name, images, folder)
        whole = run_command(folder, "whole.json", threads)
        summary = json.loads((folder / "whole.json.summary").read_text())
        bare = seconds_from_memory(folder, threads)
        # Counted from the first finished shard on, and short of the end, so that the kill hits a run in its middle.
        left = summary["seconds"] * max(0.0, 0.9 - 2 * SHARD_IMAGES / images)
        killed = run_command(folder, "out.json", threads, kill_after=random.Random(seed).uniform(0, left))
        finished = len(list((folder / "out.json.parts").glob("shard_*")))
        run_command(folder, "out.json", threads)
        same = (folder / "out.json").read_bytes() == (folder / "whole.json").read_bytes()
    except (TransfinerError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    draw_memory(whole, picture, images)
    figures = {
        "images": images,
        "masks": summary["masks"],
        "images_per_second": summary["images_per_second"],
        "images_per_second_from_memory": images / bare,
        "slower": summary["seconds"] / bare - 1,
        "peak_mb": max(whole.memory) / MEGABYTE,
        "growth_mb": whole.growth() / MEGABYTE,
        "killed": killed.killed,
        "shards_before_the_kill": finished,
        "same_bytes_after_the_kill": same,
    }
    table = Table("figure", "value", title=f"{images} images of {name}, {threads} threads")
    for key, value in figures.items():
        table.add_row(key, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=1))
    if not same or not killed.killed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
