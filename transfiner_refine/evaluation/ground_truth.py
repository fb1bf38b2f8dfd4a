"""What the images of a set hold: COCO annotations, checked once for every measure that is taken against them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from transfiner_refine.data.coco import ImageId, Result, load_json
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle

ANY_CATEGORY = 1
"""The one category that is left where categories play no part."""


@dataclass(frozen=True)
class Federation:
    """What federated annotations (LVIS) leave open: an image is annotated for some of the categories only.

    Attributes:
        absent: Categories that are known not to be in an image, by image id.
        incomplete: Categories of which an image holds more objects than were annotated, by image id.
    """

    absent: Mapping[ImageId, frozenset[int]]
    incomplete: Mapping[ImageId, frozenset[int]]


@dataclass(frozen=True)
class GroundTruth:
    """Annotations of a set of images.

    Attributes:
        sizes: ``(H, W)`` of every image that is evaluated, by image id.
        objects: COCO annotations of these images with ``image_id``, ``category_id``, ``iscrowd``, ``area`` (pixels) and
            ``segmentation`` (checked, compressed run lengths).
        categories: Ids of the categories that are evaluated.
        left_out: Images of the set that are not evaluated; results on them are passed over.
        uses_categories: False if every object and every result counts as ``ANY_CATEGORY``.
        federation: What is not annotated; None if every object of every category is.
    """

    sizes: Mapping[ImageId, tuple[int, int]]
    objects: Sequence[Result]
    categories: Collection[int]
    left_out: frozenset[ImageId] = frozenset()
    uses_categories: bool = True
    federation: Federation | None = None

    def regardless_of_category(self) -> GroundTruth:
        """The same objects, all of one category: a result matches whatever object its mask fits.

        Raises:
            InvalidInputError: If the annotations are federated.
        """
        if self.federation is not None:
            raise InvalidInputError(
                "expected COCO annotations to pass over categories, got LVIS annotations, which say by category what "
                "they leave out: load COCO's"
            )
        objects = [{**entry, "category_id": ANY_CATEGORY} for entry in self.objects]
        return replace(self, objects=objects, categories=(ANY_CATEGORY,), uses_categories=False)

    def check_results(self, results: Sequence[Result]) -> list[Result]:
        """Bring results on these images to one form.

        Args:
            results: Entries of a COCO results file.

        Returns:
            Copies of the entries on the images that are evaluated, in their order, with ``segmentation`` as checked,
            compressed run lengths, ``area`` in pixels, ``category_id`` and ``score``.

        Raises:
            InvalidInputError: If an entry is of an unknown image, lacks a category or a score, or its segmentation is
                broken, or none of the results is of a category that occurs; the message says which. Where no category
                occurs at all, results are of any.

        Note:
            ``area`` is always that of the mask. pycocotools takes the area of ``bbox`` where an entry has one, which
            moves results between the small, medium and large; Detectron2 and MMDetection drop the boxes for that.
        """
        checked = []
        for position, entry in enumerate(results):
            if entry["image_id"] in self.left_out:
                continue
            try:
                checked.append(self._checked(entry))
            except InvalidInputError as error:
                raise InvalidInputError(f"entry {position}: {error}") from None
        known = {entry["category_id"] for entry in self.objects}
        if self.federation is not None:
            known |= set().union(*self.federation.absent.values())
        if checked and known and known.isdisjoint(found := {entry["category_id"] for entry in checked}):
            raise InvalidInputError(
                f"expected results of the categories that are annotated, {_named(known)}, got {_named(found)}: map "
                "the category ids, or match masks regardless of category (--class-agnostic)"
            )
        return checked

    def _checked(self, entry: Result) -> Result:
        size = self.sizes.get(entry["image_id"])
        if size is None:
            raise InvalidInputError(
                f"expected an image_id of the annotations, got {entry['image_id']!r}: give the annotations of the set "
                "that was predicted on"
            )
        score = entry.get("score")
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InvalidInputError(f"expected a score, which ranks the results, got {score!r}")
        category = entry.get("category_id") if self.uses_categories else ANY_CATEGORY
        if not isinstance(category, int):
            raise InvalidInputError(f"expected an integer category_id, got {category!r}")
        return {**entry, "category_id": category, "score": float(score), **_mask_fields(entry["segmentation"], size)}


def load_ground_truth(path: Path | str, only: Collection[str] | None = None) -> GroundTruth:
    """Read a COCO annotations file.

    Args:
        path: A JSON object with ``images`` (``id``, ``height``, ``width``), ``annotations`` and ``categories``.
        only: File names of the images to evaluate; None evaluates all.

    Returns:
        The annotations of these images. Where one has no ``area``, or null, it is counted.

    Raises:
        InvalidInputError: If the file cannot be read or is not of this form, a segmentation is broken, a file name of
            ``only`` is not in it, or with ``only`` an image has no file name.
    """
    document = load_annotations_document(path)
    images = document["images"]
    if only is not None:
        if unnamed := [image for image in images if not isinstance(image.get("file_name"), str)]:
            raise InvalidInputError(
                f'expected a "file_name" in every one of "images" in {path}, got {str(unnamed[0])[:80]}: add it, or '
                "evaluate all images"
            )
        names = {image["file_name"] for image in images}
        if missing := set(only) - names:
            raise InvalidInputError(
                f"expected the file names to evaluate among the images of {path}, got {len(missing)} unknown: "
                f"{_named(missing)}"
            )
        images = [image for image in images if image["file_name"] in only]
    sizes = image_sizes(images, path)
    categories = tuple(category["id"] for category in document["categories"])
    left_out = frozenset(image["id"] for image in document["images"] if image["id"] not in sizes)
    return GroundTruth(sizes, checked_objects(document["annotations"], sizes, path), categories, left_out)


def load_annotations_document(path: Path | str) -> dict[str, list[Result]]:
    """Read an annotations file, and make sure of its three lists of objects.

    Raises:
        InvalidInputError: If the file cannot be read or lacks one of ``images``, ``annotations`` and ``categories``, or
            an image or category lacks its ``id``.
    """
    document = load_json(path)
    for name in ("images", "annotations", "categories"):
        section = document.get(name) if isinstance(document, dict) else None
        if not isinstance(section, list) or not all(isinstance(entry, dict) for entry in section):
            found = f"{name} missing or malformed" if isinstance(document, dict) else f"a {type(document).__name__}"
            raise InvalidInputError(
                f'expected a COCO annotations file with the lists "images", "annotations" and "categories" in {path}, '
                f"got {found}"
            )
        if name != "annotations" and (bad := [entry for entry in section if "id" not in entry]):
            raise InvalidInputError(f'expected an "id" in every one of "{name}" in {path}, got {str(bad[0])[:80]}')
    return document


def image_sizes(images: Sequence[Result], path: Path | str) -> dict[ImageId, tuple[int, int]]:
    """Take ``(H, W)`` of every image, by image id.

    Raises:
        InvalidInputError: If an image has no size.
    """
    for image in images:
        sides = (image.get("height"), image.get("width"))
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise InvalidInputError(
                f'expected "height" and "width" in pixels for every image in {path}, got {sides[0]!r} and '
                f"{sides[1]!r} for image {image['id']!r}"
            )
    return {image["id"]: (image["height"], image["width"]) for image in images}


def checked_objects(
    annotations: Sequence[Result], sizes: Mapping[ImageId, tuple[int, int]], path: Path | str
) -> list[Result]:
    """Bring the annotations of some images to the form of :class:`GroundTruth`; those of other images are dropped.

    Raises:
        InvalidInputError: If an annotation lacks a field, or its segmentation is broken; the message says which.
    """
    objects = []
    for position, entry in enumerate(annotations):
        if missing := {"image_id", "category_id", "segmentation"} - entry.keys():
            raise InvalidInputError(
                f"{path}, annotation {position}: expected image_id, category_id and segmentation, got no "
                f"{' and no '.join(sorted(missing))}"
            )
        if entry["image_id"] not in sizes:
            continue
        try:
            fields = _mask_fields(entry["segmentation"], sizes[entry["image_id"]])
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}, annotation {position}: {error}") from None
        # Some tools write null where they have no value.
        area = entry.get("area")
        objects.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "iscrowd": int(entry.get("iscrowd") or 0),
                **fields,
                "area": fields["area"] if area is None else area,
            }
        )
    return objects


def _mask_fields(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    code: Any = rle.compress(segmentation, size)
    return {"segmentation": code, "area": float(coco_mask.area(code))}


def _named(values: Collection[Any], most: int = 5) -> str:
    """List the first few values."""
    first = ", ".join(repr(value) for value in sorted(values, key=str)[:most])
    return f"{first} and {len(values) - most} more" if len(values) > most else first
