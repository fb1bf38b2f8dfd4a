"""The data sets of the paper in the layouts that they are distributed in, all brought to COCO's form.

Reading the label images of Cityscapes or BDD100K takes minutes; ``load_dataset(...).save("train.json")`` does it once,
and :func:`load_coco` takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transfiner_refine.data.coco import ImageId, group_by_image, write_json_atomic
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.ground_truth import image_sizes, load_annotations_document
from transfiner_refine.functional import rle

Layout = Literal["coco", "cityscapes", "bdd100k"]
Record = dict[str, Any]

CITYSCAPES_CATEGORIES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"
}  # fmt: skip
"""Label ids of Cityscapes that have instances and are evaluated."""

BDD100K_CATEGORIES = {
    1: "pedestrian", 2: "rider", 3: "car", 4: "truck", 5: "bus", 6: "train", 7: "motorcycle", 8: "bicycle"
}  # fmt: skip
"""Category ids of BDD100K's instance segmentation."""

CROWD_OR_IGNORE = 0b0011
"""The bits of BDD100K's attributes that take a region out of training and evaluation; others: occluded, truncated."""


@dataclass(frozen=True)
class CocoDataset:
    """Images with annotated instances, in COCO's form.

    Attributes:
        folder: Folder that file names are relative to.
        images: Records with ``id``, ``file_name``, ``height`` and ``width``.
        annotations: Records with ``image_id``, ``category_id``, ``segmentation`` (run lengths or polygons) and, where
            the source has them, ``id``, ``bbox`` (xywh, image pixels), ``area`` and ``iscrowd``: a region to be left
            out of training, and out of evaluation.
        categories: Records with ``id`` and ``name``; ids are the data set's own, and need not be consecutive.
    """

    folder: Path
    images: list[Record]
    annotations: list[Record]
    categories: list[Record]

    def __len__(self) -> int:
        return len(self.images)

    def path_of(self, image: Record) -> Path:
        """File of one of the images."""
        return self.folder / image["file_name"]

    def by_image(self) -> dict[ImageId, list[Record]]:
        """Annotations of every image, also of those without any, by image id."""
        groups = group_by_image(self.annotations)
        return {image["id"]: [self.annotations[i] for i in groups.get(image["id"], [])] for image in self.images}

    def save(self, path: Path | str) -> None:
        """Write a COCO annotations file, whole or not at all; file names stay relative to ``folder``."""
        document = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        write_json_atomic(path, document)


def load_dataset(layout: Layout, root: Path | str, split: str) -> CocoDataset:
    """Read one split of a data set from the folders that it is distributed in.

    ==============  ===================================================  ============================================
    layout          annotations below ``root``                           images below ``root``
    ==============  ===================================================  ============================================
    ``coco``        ``annotations/instances_SPLIT.json``                 ``SPLIT``
    ``cityscapes``  ``gtFine/SPLIT/CITY/*_gtFine_instanceIds.png``       ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png``
    ``bdd100k``     ``labels/ins_seg/bitmasks/SPLIT/*.png``              ``images/10k/SPLIT/*.jpg``
    ==============  ===================================================  ============================================

    Args:
        layout: Which of the three.
        root: The data set's folder.
        split: ``"train2017"`` or ``"val2017"`` of COCO, ``"train"`` or ``"val"`` of the others.

    Raises:
        InvalidInputError: If a folder or an image is missing, or a file is not what its layout says.
    """
    loaders: dict[str, Callable[[Path, str], CocoDataset]] = {
        "coco": _load_coco_split,
        "cityscapes": _load_cityscapes,
        "bdd100k": _load_bdd100k,
    }
    if layout not in loaders:
        raise InvalidInputError(f"expected a layout of {', '.join(loaders)}, got {layout!r}")
    return loaders[layout](Path(root), split)


def load_coco(annotations: Path | str, images: Path | str) -> CocoDataset:
    """Read a COCO annotations file.

    Args:
        annotations: JSON object with ``images``, ``annotations`` and ``categories``.
        images: Folder that its file names are relative to.

    Raises:
        InvalidInputError: If the folder is missing, the file is not of this form, or an annotation is of an image or a
            category that the file does not have. The segmentations themselves are checked when they are decoded.
    """
    folder = _folder(Path(images), "images")
    document = load_annotations_document(annotations)
    known_images = image_sizes(document["images"], annotations).keys()
    if unnamed := [image["id"] for image in document["images"] if not isinstance(image.get("file_name"), str)]:
        raise InvalidInputError(f'expected a "file_name" of every image in {annotations}, got none for {unnamed[:5]}')
    known_categories = {category["id"] for category in document["categories"]}
    for position, entry in enumerate(document["annotations"]):
        if missing := {"image_id", "category_id", "segmentation"} - entry.keys():
            raise InvalidInputError(
                f"{annotations}, annotation {position}: expected image_id, category_id and segmentation, got no "
                f"{' and no '.join(sorted(missing))}"
            )
        if entry["image_id"] not in known_images or entry["category_id"] not in known_categories:
            raise InvalidInputError(
                f"{annotations}, annotation {position}: expected an image and a category of the file, got image_id "
                f"{entry['image_id']!r} and category_id {entry['category_id']!r}"
            )
    return CocoDataset(folder, document["images"], document["annotations"], document["categories"])


def _load_coco_split(root: Path, split: str) -> CocoDataset:
    folder = _folder(root / "annotations", "annotations")
    return load_coco(folder / f"instances_{split}.json", root / split)


def _load_cityscapes(root: Path, split: str) -> CocoDataset:
    images = _folder(root / "leftImg8bit" / split, "images")
    labels, kind = _folder(root / "gtFine" / split, "instance ids"), "_gtFine_instanceIds.png"
    pairs = [
        (f"{path.parent.name}/{path.name.removesuffix(kind)}_leftImg8bit.png", path)
        for path in sorted(labels.glob(f"*/*{kind}"))
    ]
    return _from_label_images(images, labels, pairs, _read_instance_ids, CITYSCAPES_CATEGORIES)


def _load_bdd100k(root: Path, split: str) -> CocoDataset:
    images = _folder(root / "images" / "10k" / split, "images")
    labels = _folder(root / "labels" / "ins_seg" / "bitmasks" / split, "bitmasks")
    pairs = [(f"{path.stem}.jpg", path) for path in sorted(labels.glob("*.png"))]
    return _from_label_images(images, labels, pairs, _read_bitmask, BDD100K_CATEGORIES)


class _Region(NamedTuple):
    """A value of a label image, and what it means."""

    value: int
    category_id: int
    is_crowd: bool


def _read_instance_ids(path: Path) -> tuple[NDArray, list[_Region]]:
    """Read a Cityscapes label image: an instance is 1000 · label + number, a group not told apart is its label."""
    ids = _read(path)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InvalidInputError(f"expected instance ids in one channel, got {ids.shape} {ids.dtype} in {path}")
    regions = [
        _Region(value, label, is_crowd=value < 1000)
        for value in np.unique(ids).tolist()
        if (label := value // 1000 if value >= 1000 else value) in CITYSCAPES_CATEGORIES
    ]
    return ids, regions


def _read_bitmask(path: Path) -> tuple[NDArray, list[_Region]]:
    """Read a BDD100K bitmask: red the category, green the attributes, blue and alpha the number of the annotation."""
    rgba = _read(path)
    if rgba.ndim != 3 or rgba.shape[2] != 4 or rgba.dtype != np.uint8:
        raise InvalidInputError(
            f"expected a bitmask with the channels RGBA, 8 bits each, got {rgba.shape} {rgba.dtype} in {path}: "
            "colormaps and masks of semantic segmentation lie in other folders"
        )
    values = np.ascontiguousarray(rgba).view(">u4")[..., 0]
    regions = [
        _Region(value, value >> 24, is_crowd=bool(value >> 16 & CROWD_OR_IGNORE))
        for value in np.unique(values).tolist()
        if value >> 24
    ]
    if unknown := sorted({region.category_id for region in regions} - BDD100K_CATEGORIES.keys()):
        raise InvalidInputError(
            f"expected categories 1 to {len(BDD100K_CATEGORIES)} in the red channel, got {unknown} in {path}: "
            "bitmasks of panoptic segmentation have others, use those of ins_seg"
        )
    return values, regions


def _from_label_images(
    images: Path,
    labels: Path,
    pairs: Sequence[tuple[str, Path]],
    read: Callable[[Path], tuple[NDArray, list[_Region]]],
    categories: dict[int, str],
) -> CocoDataset:
    """Collect the regions of label images.

    Args:
        images: Folder of the images.
        labels: Folder of the label images, for the message.
        pairs: File name of each image, relative to ``images``, and its label image.
        read: Reads a label image ``(H, W)`` and lists its regions.
        categories: Names by category id.
    """
    if not pairs:
        raise InvalidInputError(f"expected label images in {labels}, got none: check that the archive was unpacked")
    if missing := [name for name, _ in pairs if not (images / name).is_file()]:
        raise InvalidInputError(
            f"expected an image in {images} for every label image, got {len(missing)} missing: {', '.join(missing[:5])}"
        )

    def annotate(path: Path) -> tuple[tuple[int, ...], list[Record]]:
        values, regions = read(path)
        values = np.asfortranarray(values)  # run lengths go down the columns
        return values.shape, [_annotation(values == region.value, region) for region in regions]

    records: list[Record] = []
    annotations: list[Record] = []
    pool = ThreadPoolExecutor()  # decoding and comparing release Python's lock
    try:
        found = pool.map(annotate, [path for _, path in pairs])
        for image_id, ((name, _), (size, entries)) in enumerate(zip(pairs, found, strict=True), start=1):
            records.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
            for entry in entries:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    finally:
        pool.shutdown(cancel_futures=True)
    names = [{"id": category, "name": name} for category, name in categories.items()]
    return CocoDataset(images, records, annotations, names)


def _annotation(mask: NDArray[np.bool_], region: _Region) -> Record:
    """Describe a mask ``(H, W)`` that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    x, y = columns[0], rows[0]
    (segmentation,) = rle.encode(mask[None])
    return {
        "category_id": region.category_id,
        "bbox": [x, y, columns[-1] + 1 - x, rows[-1] + 1 - y],
        "area": int(np.count_nonzero(mask)),
        "iscrowd": int(region.is_crowd),
        "segmentation": segmentation,
    }


def _read(path: Path) -> NDArray:
    try:
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's decoders raise all three for damage
        raise InvalidInputError(f"expected a label image, got {path}: {error}") from error


def _folder(path: Path, content: str) -> Path:
    """Check that a folder of the layout is there."""
    if not path.is_dir():
        above = next(parent for parent in path.parents if parent.is_dir())
        raise InvalidInputError(
            f"expected a folder of {content} at {path}, got none: {above} has no {path.relative_to(above).parts[0]}; "
            "check the root and the split"
        )
    return path
