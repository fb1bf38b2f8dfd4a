"""COCO files in and out: results (what a detector predicted), annotations (which file an image id means).

A results file is a JSON list with one entry for each instance: ``image_id``, ``segmentation``, and usually ``bbox``
(xywh, image pixels), ``category_id`` and ``score``. Whatever else an entry holds is carried along.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.types import Instances

ImageId = int | str
Result = dict[str, Any]
"""One entry of a results file."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

LARGEST = torch.finfo(torch.float32).max
"""Largest coordinate of a box."""

NAMED_AT_MOST = 5
"""Offenders that an error lists by name; the rest are counted."""


def load_results(path: Path | str) -> list[Result]:
    """Read a COCO results file and check every entry.

    Args:
        path: A JSON list of entries. The segmentations themselves are checked when they are decoded.

    Returns:
        The entries, in the order of the file.

    Raises:
        InvalidInputError: If the file cannot be read, is not JSON or not a list, or an entry lacks ``image_id`` or
            ``segmentation`` or has a malformed ``bbox``; the message says which entry.
    """
    results = load_json(path)
    if isinstance(results, dict):
        remedy = (
            "that is an annotations file, which names images and not predictions"
            if "images" in results
            else "write the list alone"
        )
        raise InvalidInputError(
            f"expected a list of COCO results in {path}, got an object with the keys {_named(list(results))}: {remedy}"
        )
    if not isinstance(results, list):
        raise InvalidInputError(f"expected a list of COCO results in {path}, got {type(results).__name__}")
    return _checked_entries(results, path)


def load_annotations(path: Path | str) -> list[Result]:
    """Read the ``annotations`` of a COCO annotations file, and check every entry as ``load_results`` does.

    Raises:
        InvalidInputError: If the file cannot be read, has no ``annotations``, or one of them is malformed.
    """
    return _checked_entries(load_section(path, "annotations"), path)


def load_image_index(path: Path | str) -> dict[ImageId, str]:
    """Read which file each image id means, from the ``images`` of a COCO or LVIS annotations file.

    Args:
        path: A JSON object with ``images``, each with ``id`` and ``file_name``. LVIS has a ``coco_url`` instead, the
            last two parts of which count: ``train2017/000000391895.jpg``.

    Returns:
        File names, relative to the folder of images, by image id.

    Raises:
        InvalidInputError: If the file cannot be read, is not of this form, or gives an id two file names.
    """
    names: dict[ImageId, str] = {}
    for index, image in enumerate(load_section(path, "images")):
        name = _file_name(image) if isinstance(image, dict) else None
        if name is None or not _is_id(image.get("id")):
            raise InvalidInputError(
                f'expected "id" and "file_name" (or "coco_url", as in LVIS) in every one of "images" in {path}, got '
                f"{str(image)[:80]} at {index}"
            )
        if names.setdefault(image["id"], name) != name:
            raise InvalidInputError(
                f'expected one file name for every id of "images" in {path}, got {names[image["id"]]!r} and {name!r} '
                f"for {image['id']!r}: number the images anew where files were joined"
            )
    return names


def group_by_image(results: Iterable[Result]) -> dict[ImageId, list[int]]:
    """Collect the positions of each image's entries, images in the order of their first entry."""
    groups: dict[ImageId, list[int]] = {}
    for position, entry in enumerate(results):
        groups.setdefault(entry["image_id"], []).append(position)
    return groups


def find_images(
    folder: Path | str,
    image_ids: Iterable[ImageId],
    file_names: Mapping[ImageId, str] | None = None,
    *,
    missing_ok: bool = False,
) -> dict[ImageId, Path]:
    """Find the file of every image id.

    Args:
        folder: Where the images are.
        image_ids: The ids to find.
        file_names: File names by id, see ``load_image_index``; one that names a subfolder is looked for without it too,
            if the folder given has its name, or no two images have this name. Without them an id is found by the name
            of the file without its suffix: the same text, or for a number the same number, so that 139 finds
            ``000000000139.jpg``.
        missing_ok: Whether some of the files, but not all, may be missing.

    Returns:
        An existing file for each id; ids without one are left out if ``missing_ok``.

    Raises:
        InvalidInputError: If the folder is none, an id is ambiguous or unknown to ``file_names``, or files are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInputError(f"expected a folder of images, got {folder}: check the path")
    image_ids = list(image_ids)
    if file_names is None:
        return _find_by_stem(folder, image_ids, missing_ok)
    if unknown := [image_id for image_id in image_ids if image_id not in file_names]:
        raise InvalidInputError(
            f"expected every image_id of the predictions among the annotations' images, got {len(unknown)} unknown: "
            f"{_named(unknown)}; give the annotations of the set that was predicted on"
        )
    paths: dict[ImageId, Path] = {}
    missing = []
    often, own = Counter(Path(name).name for name in file_names.values()), folder.resolve().name
    for image_id in image_ids:
        name = Path(file_names[image_id])
        places = [folder / name]
        if name.parent.name == own or often[name.name] == 1:
            places.append(folder / name.name)
        path = next(filter(_is_file, places), None)
        if path is None:
            missing.append(name.name)
        else:
            paths[image_id] = path
    if missing and not (missing_ok and paths):
        raise InvalidInputError(
            f"expected the images of the predictions in {folder}, got {len(missing)} missing: {_named(missing)}"
        )
    return paths


def decode_masks(
    results: Sequence[Result] | Mapping[int, Result], positions: Sequence[int], size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Decode the segmentations of one image's entries.

    Args:
        results: All entries of the file, or those of the image by their positions.
        positions: N positions, all of one image.
        size: ``(H, W)`` of the image.

    Returns:
        ``(N, H, W)`` bool, image frame.

    Raises:
        InvalidInputError: If a segmentation is broken or of another size; the message says which entry.
    """
    masks = np.empty((len(positions), *size), bool)
    for mask, position in zip(masks, positions, strict=True):
        try:
            mask[:] = rle.decode(results[position]["segmentation"], size)
        except InvalidInputError as error:
            raise InvalidInputError(f"entry {position}: {error}") from None
    return masks


def boxes_of(entries: Sequence[Result], mask_boxes: Tensor) -> Tensor:
    """Take the entries' boxes, and the box of the mask where an entry has none or one without area.

    Where the mask is empty too, it is a square of one pixel: boxes need an area, and nothing is there to refine.

    Args:
        entries: N entries of one image.
        mask_boxes: ``(N, 4)`` float xyxy, image pixels: the tight box of each mask, zeros for an empty one.

    Returns:
        ``(N, 4)`` float32 xyxy, image pixels.
    """
    given = [entry.get("bbox") or (0, 0, 0, 0) for entry in entries]
    xywh = torch.tensor(given, dtype=torch.float32).reshape(-1, 4)
    boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
    # In float32 a sliver far from the origin can lose its area too.
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
    mask_boxes = torch.where(mask_boxes.any(dim=1, keepdim=True), mask_boxes, mask_boxes.new_tensor([0, 0, 1, 1]))
    return torch.where(has_area, boxes, mask_boxes)


def decode_instances(
    results: Sequence[Result] | Mapping[int, Result], positions: Sequence[int], size: tuple[int, int]
) -> Instances:
    """Decode one image's entries: ``decode_masks``, with the boxes of ``boxes_of``."""
    return join_instances(decode_masks(results, positions, size), [results[position] for position in positions])


def join_instances(masks: NDArray, entries: Sequence[Result]) -> Instances:
    """Join N masks ``(N, H, W)``, bool or float probabilities, with the boxes of their entries."""
    stack = torch.from_numpy(masks)
    size = (stack.shape[1], stack.shape[2])
    return Instances(boxes=boxes_of(entries, boxes_from_masks(stack)), masks=stack, image_size=size)


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Write JSON whole or not at all, see ``write_atomic``."""
    write_atomic(path, json.dumps(value).encode("utf-8"))


def write_atomic(path: Path | str, content: bytes) -> None:
    """Write a file whole or not at all.

    The content goes to a temporary file beside ``path``, which then takes its name: a run that fails or is interrupted
    leaves the old file as it was. Missing folders are made.

    Raises:
        InvalidInputError: If the place cannot be written to.
    """
    target = check_output(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise InvalidInputError(f"expected to write {path}, got: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path | str) -> Path:
    """Make sure that a file can be written, before the work that it waits for; missing folders are made.

    Returns:
        The path with links resolved, so that a link is written through rather than replaced.

    Raises:
        InvalidInputError: If ``path`` is a folder or lies where nothing can be written.
    """
    target = Path(path).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"expected a folder for {path} that can be made, got: {error.strerror}") from error
    if target.is_dir():
        raise InvalidInputError(f"expected a file to write, got the folder {path}: add a file name")
    if not os.access(target.parent, os.W_OK):
        raise InvalidInputError(f"expected a folder that can be written to, got {target.parent}: check its permissions")
    return target


def check_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Make sure that what is written replaces nothing that is read, and nothing else that is written.

    Args:
        outputs: Files to write, by what errors call them; None for what is not asked for.
        inputs: Files to read, likewise.

    Raises:
        InvalidInputError: If two of them are the same file, both of ``inputs`` apart.
    """
    known = {path.resolve(): name for name, path in inputs.items() if path is not None}
    for name, path in outputs.items():
        if path is not None and (other := known.setdefault(path.resolve(), name)) != name:
            raise InvalidInputError(f"expected a file of its own for {name}, got {path}, which is also {other}")


def _is_file(path: Path) -> bool:
    """Whether there is such a file; names that no file can have are those of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _find_by_stem(folder: Path, image_ids: list[ImageId], missing_ok: bool) -> dict[ImageId, Path]:
    files: dict[ImageId, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            keys: set[ImageId] = {path.stem} | ({int(path.stem)} if path.stem.isdecimal() else set())
            for key in keys:
                files.setdefault(key, []).append(path)
    unknown = [image_id for image_id in image_ids if image_id not in files]
    if unknown and not (missing_ok and len(unknown) < len(image_ids)):
        raise InvalidInputError(
            f"expected an image in {folder} named after every image_id, as 139 is by 000000000139.jpg, "
            f"got {len(unknown)} without: {_named(unknown)}; give the annotations that map ids to file names"
        )
    found = [image_id for image_id in image_ids if image_id in files]
    for image_id in found:
        if len(files[image_id]) > 1:
            raise InvalidInputError(
                f"expected one image in {folder} for image_id {image_id!r}, got "
                f"{_named([path.name for path in files[image_id]])}; give the annotations that map ids to file names"
            )
    return {image_id: files[image_id][0] for image_id in found}


def load_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        InvalidInputError: If the file cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InvalidInputError(f"expected a JSON file, got {path}: {error.strerror}") from error
    except RecursionError:
        raise InvalidInputError(f"expected a JSON file, got {path}, which is nested too deeply") from None
    except ValueError as error:  # malformed JSON, or text that is no Unicode
        raise InvalidInputError(f"expected a JSON file, got {path}, which is not JSON: {error}") from error


def load_section(path: Path | str, name: str) -> list[Any]:
    """Read one list of a COCO annotations file; its entries are not checked.

    Raises:
        InvalidInputError: If the file cannot be read or has no such list.
    """
    document = load_json(path)
    section = document.get(name) if isinstance(document, dict) else None
    if not isinstance(section, list):
        found = f"an object with the keys {_named(list(document))}" if isinstance(document, dict) else "no object"
        raise InvalidInputError(f'expected a COCO annotations file with a list "{name}" in {path}, got {found}')
    return section


def _checked_entries(entries: list[Any], path: Path | str) -> list[Result]:
    for index, entry in enumerate(entries):
        if fault := entry_fault(entry):
            raise InvalidInputError(f"{path}, entry {index}: {fault}")
    return entries


def entry_fault(entry: Any) -> str | None:
    """Say what is wrong with an entry of a results file; None if nothing is."""
    if not isinstance(entry, dict):
        return f"expected an object, got {str(entry)[:60]}"
    if missing := {"image_id", "segmentation"} - entry.keys():
        return f'expected "image_id" and "segmentation", got no {" and no ".join(sorted(missing))}'
    if not _is_id(entry["image_id"]):
        return f"expected an image_id that is an integer or a string, got {entry['image_id']!r}"
    box = entry.get("bbox")
    if box is None:
        return None
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(value, (int, float)) and abs(value) <= LARGEST for value in box)
        or min(box[2:]) < 0
    ):
        return f"expected bbox as 4 finite numbers x, y, width, height, got {box}"
    return None


def _file_name(image: Result) -> str | None:
    """The file name of one of an annotations file's images, relative to the folder of images."""
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(name, str):
        return name
    return "/".join(url.rsplit("/", 2)[1:]) if isinstance(url, str) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _named(values: Sequence[Any]) -> str:
    """List the first few values."""
    rest = len(values) - NAMED_AT_MOST
    return ", ".join(repr(value) for value in values[:NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
