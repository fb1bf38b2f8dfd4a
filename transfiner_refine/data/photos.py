"""Whole photos with all of their objects, as a detector is trained on them.

N objects of a photo, H W its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfiner_refine.data.annotated import DataFiles
from transfiner_refine.data.coco import ImageId, decode_masks
from transfiner_refine.data.datasets import CocoDataset, Record, load_coco
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_image


class PhotoSample(NamedTuple):
    """A photo and its objects.

    Attributes:
        image: ``(3, H, W)`` uint8 RGB.
        masks: ``(N, H, W)`` bool, none of them empty; N may be 0.
        labels: ``(N,)`` int64, place of each object's category among the data set's.
    """

    image: Tensor
    masks: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PhotoSet:
    """Photos of a COCO-format data set, those without an object included; crowds are left out.

    Attributes:
        data: The data set.
        categories: Its categories in the order of their ids: an object's label is its category's place here.
    """

    data: CocoDataset
    categories: tuple[Record, ...]

    @classmethod
    def read(cls, files: DataFiles, categories: Sequence[Record] | None = None) -> PhotoSet:
        """Read a data set.

        Args:
            files: Images and annotations.
            categories: What the labels shall mean; None takes the categories of the file.

        Raises:
            InvalidInputError: If the file is malformed, an image is missing, there is no object at all, or there is one
                of a category that is not among ``categories``.
        """
        data = load_coco(files.annotations, files.images)
        entries = [x for x in data.annotations if x["segmentation"] and not x.get("iscrowd")]
        if not entries:
            raise InvalidInputError(
                f"expected annotated objects in {files.annotations}, got none: annotate at least one with a "
                "segmentation; crowds do not count"
            )
        if missing := [image["file_name"] for image in data.images if not data.path_of(image).is_file()]:
            raise InvalidInputError(
                f"expected the images of {files.annotations} in {files.images}, got {len(missing)} missing, "
                f"{missing[0]!r} the first: check the folder"
            )
        own = sorted(data.categories, key=lambda category: category["id"])
        known = tuple(own if categories is None else categories)
        if unknown := {entry["category_id"] for entry in entries} - {category["id"] for category in known}:
            raise InvalidInputError(
                f"expected categories of the detector, {[category['id'] for category in known]}, in "
                f"{files.annotations}, got {sorted(unknown)}: leave these annotations out, or start from a detector of "
                "these categories"
            )
        return cls(replace(data, annotations=entries), known)

    def __len__(self) -> int:
        return len(self.data.images)

    @cached_property
    def _entries(self) -> dict[ImageId, list[Record]]:
        return self.data.by_image()

    @property
    def count(self) -> int:
        """Objects."""
        return len(self.data.annotations)

    @property
    def file_names(self) -> list[str]:
        """Of all photos."""
        return [image["file_name"] for image in self.data.images]

    def subset(self, positions: Sequence[int]) -> PhotoSet:
        """Some of the photos, in the order of ``positions``."""
        images = [self.data.images[position] for position in positions]
        kept = {image["id"] for image in images}
        entries = [entry for entry in self.data.annotations if entry["image_id"] in kept]
        return replace(self, data=replace(self.data, images=images, annotations=entries))

    def split(self, share: float, seed: int) -> tuple[PhotoSet, PhotoSet]:
        """Set a share of the photos apart, at random; photos with and without objects are shared out alike.

        Args:
            share: Share of the photos, between 0 and 1; at least one photo with objects goes to either side.
            seed: What the choice depends on, besides the file.

        Raises:
            InvalidInputError: If ``share`` is out of range, or only one photo has objects.
        """
        if not 0 < share < 1:
            raise InvalidInputError(f"expected a validation share between 0 and 1, got {share}")
        annotated = {entry["image_id"] for entry in self.data.annotations}
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        groups = [[i for i in order if (self.data.images[i]["id"] in annotated) is has] for has in (True, False)]
        if len(groups[0]) < 2:
            raise InvalidInputError(
                f"expected at least two annotated images to set some apart, got {len(groups[0])}: add images, or give "
                "validation files of their own"
            )
        apart = set(groups[0][: min(max(1, round(share * len(groups[0]))), len(groups[0]) - 1)])
        apart |= set(groups[1][: round(share * len(groups[1]))])
        return self.subset([i for i in range(len(self)) if i not in apart]), self.subset(sorted(apart))

    def spread(self, limit: int) -> PhotoSet:
        """At most ``limit`` of the photos, spread evenly over the set, annotated ones if there are any."""
        if len(self) <= limit:
            return self
        chosen = self.subset(np.linspace(0, len(self) - 1, limit).round().astype(int).tolist())
        if chosen.count:
            return chosen
        annotated = {entry["image_id"] for entry in self.data.annotations}
        return self.subset([i for i, image in enumerate(self.data.images) if image["id"] in annotated][:limit])

    def sample(self, position: int) -> PhotoSample:
        """Read a photo.

        Raises:
            InvalidInputError: If the file is no image, its size is not that of the annotations, or a segmentation is
                broken.
        """
        record = self.data.images[position]
        image = as_image(self.data.path_of(record))
        size = (image.shape[1], image.shape[2])
        if size != (record["height"], record["width"]):
            raise InvalidInputError(
                f"expected {record['file_name']} of {record['height']} x {record['width']} pixels, as annotated, got "
                f"{size[0]} x {size[1]}: annotate the file as it is"
            )
        entries = self._entries[record["id"]]
        try:
            masks = torch.from_numpy(decode_masks(entries, range(len(entries)), size))
        except InvalidInputError as error:
            raise InvalidInputError(f"annotations of {record['file_name']}: {error}") from None
        place = {category["id"]: label for label, category in enumerate(self.categories)}
        labels = torch.tensor([place[entry["category_id"]] for entry in entries], dtype=torch.int64)
        seen = masks.flatten(1).any(dim=1)
        return PhotoSample(image, masks[seen], labels[seen])


class FlippedPhotos(Dataset[PhotoSample]):
    """Photos to train on, half of them mirrored.

    Args:
        photos: The photos.
        seed: What is mirrored depends on it, on the epoch and on the photo alone.
    """

    def __init__(self, photos: PhotoSet, seed: int) -> None:
        self.photos, self.seed = photos, seed
        # Shared memory: persistent loader workers see the epoch that the trainer sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose what is mirrored in the next pass over the data."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> PhotoSample:
        sample = self.photos.sample(index)
        if np.random.default_rng([self.seed, int(self._epoch), index]).random() < 0.5:
            return sample
        return sample._replace(image=sample.image.flip(2), masks=sample.masks.flip(2))
