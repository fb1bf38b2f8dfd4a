"""The bundled photos with a detector's masks, as files that a visitor could have uploaded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from transfiner_refine.data.coco import group_by_image, write_json_atomic
from transfiner_refine.data.demo import ASSETS, demo_results

TITLES = {"coffee.jpg": "Cup", "astronaut.jpg": "Astronaut", "chelsea.jpg": "Cat"}


@dataclass(frozen=True)
class Example:
    """A photo and the COCO results for it."""

    title: str
    photo: Path
    results: Path


def write_examples(folder: Path) -> list[Example]:
    """Copy the examples to where the page may read them, one results file for each photo.

    Args:
        folder: An existing folder.
    """
    results, names = demo_results()
    made = {}
    for image_id, positions in group_by_image(results).items():
        photo = folder / names[image_id]
        shutil.copyfile(ASSETS / photo.name, photo)
        write_json_atomic(photo.with_suffix(".json"), [results[position] for position in positions])
        made[photo.name] = Example(TITLES[photo.name], photo, photo.with_suffix(".json"))
    return [made[name] for name in TITLES]
