"""What commands on a single photo have in common: its masks from a COCO results file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from transfiner_refine.data.coco import Result, decode_instances, group_by_image, load_results
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.types import Instances


def decode_results_of(photo: Path, predictions: Path, pixels: Tensor) -> tuple[list[Result], Instances]:
    """Read and decode the results of one photo.

    Args:
        photo: The photo, whose name may be an image id.
        predictions: COCO results; all of them, if they are of one image, or those whose image id is the photo's name.
        pixels: ``(3, H, W)``, the photo.

    Returns:
        N entries, and their instances.

    Raises:
        InvalidInputError: If the file has results of several images and none of this one, or one cannot be decoded.
    """
    results = load_results(predictions)
    positions = _positions_of(photo, predictions, results)
    try:
        coarse = decode_instances(results, positions, (pixels.shape[1], pixels.shape[2]))
    except InvalidInputError as error:
        raise InvalidInputError(f"{predictions}, {error}") from None
    return [results[position] for position in positions], coarse


def _positions_of(photo: Path, predictions: Path, results: list[Result]) -> list[int]:
    groups = group_by_image(results)
    if len(groups) < 2:
        return list(range(len(results)))
    names = {photo.stem} | ({int(photo.stem)} if photo.stem.isdecimal() else set())
    chosen = [position for image_id in groups if image_id in names for position in groups[image_id]]
    if not chosen:
        raise InvalidInputError(
            f"expected results of one image in {predictions}, or some with the image_id {photo.stem!r} of the photo, "
            f"got results of {len(groups)} images: use the coco command for all of them"
        )
    return chosen
