"""The bundled photos, what a detector found on them, and outlines drawn by hand."""

from __future__ import annotations

from pathlib import Path

from transfiner_refine.data.coco import ImageId, Result, load_image_index, load_results

ASSETS = Path(__file__).parents[1] / "assets" / "demo"
DEMO_PHOTO = "coffee.jpg"
OUTLINES = ASSETS / "outlines.json"


def demo_results(every: bool = True) -> tuple[list[Result], dict[ImageId, str]]:
    """Read a detector's results of the bundled photos, or of ``DEMO_PHOTO`` alone, and all names by image id."""
    results, names = load_results(ASSETS / "detections.json"), load_image_index(OUTLINES)
    return [entry for entry in results if every or names[entry["image_id"]] == DEMO_PHOTO], names
