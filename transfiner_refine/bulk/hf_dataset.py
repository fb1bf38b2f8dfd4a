"""A dataset of Hugging Face ``datasets`` on disk, with the images and their masks in two columns."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from transfiner_refine.bulk.mask_folder import check_new_folder, encode_png
from transfiner_refine.bulk.source import Loaded, Source, stat_digest
from transfiner_refine.data.coco import join_instances
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.errors import InvalidInputError, MissingDependencyError
from transfiner_refine.functional import rle
from transfiner_refine.inputs import PILLOW_ERRORS, as_image
from transfiner_refine.types import Instances

SAVED, SPLITS = "dataset_info.json", "dataset_dict.json"
"""What ``save_to_disk`` leaves in the folder of a dataset, and in that of several splits."""

AS_IT_CAME = b""
"""Record of a mask that could not be refined: the output has what the row holds, which need not be an image at all."""


def is_dataset(path: Path) -> bool:
    """Whether a path is a folder of ``save_to_disk``, or one of parquet files."""
    return (path / SAVED).is_file() or (path / SPLITS).is_file() or bool(_parquet_files(path))


class HFDataset(Source):
    """A dataset that was saved to disk, or a folder of parquet files; the output is the same with other masks.

    The column of images has the feature ``Image``; that of the masks one of ``Image``, ``List(Image)`` and ``List`` of
    run lengths, ``{"size": List(int), "counts": string or binary}``. Boxes are those of the masks. Parquet is unpacked
    into the cache of ``datasets`` first.

    Args:
        path: The folder.
        image_column: Name of the images' column.
        masks_column: Name of the masks' column.

    Raises:
        MissingDependencyError: If ``datasets`` is not installed.
        InvalidInputError: If the folder has several splits, no such columns, or cannot be read.
    """

    noun: ClassVar[str] = "row"

    def __init__(self, path: Path, image_column: str = "image", masks_column: str = "masks"):
        datasets = _library()
        if (path / SPLITS).is_file():
            splits = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
            raise InvalidInputError(f"expected one split, got a dataset of {splits} in {path}: name the folder of one")
        self.path, self.image_column, self.masks_column = path, image_column, masks_column
        self._files = [] if (path / SAVED).is_file() else _parquet_files(path)
        named = self._files[0].name if self._files else SAVED
        with _reading(path, named):
            if self._files:
                dataset = datasets.Dataset.from_parquet([str(file) for file in self._files])
            else:
                dataset = datasets.load_from_disk(path)
        for name in (image_column, masks_column):
            if name not in dataset.features:
                raise InvalidInputError(
                    f"expected a column {name!r} in {path}, got {list(dataset.features)}: name it with --image-column "
                    "or --masks-column"
                )
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise InvalidInputError(
                f"expected the column {image_column!r} of {path} to be images, got {dataset.features[image_column]}: "
                "cast it to datasets.Image()"
            )
        self._features = dataset.features
        self._mask_bytes, self._is_list = _mask_kind(datasets, dataset.features[masks_column], masks_column)
        # Bytes as they are stored: images are decoded here, masks are not decoded for nothing.
        with _reading(path, named):
            self._rows = dataset.cast(_undecoded(datasets, dataset.features))
            self._starts = np.cumsum([0, *self._counts(dataset)])
        self.record_count = int(self._starts[-1])

    def __reduce__(self) -> tuple[Callable[..., HFDataset], tuple[Path, str, str]]:
        # Another machine opens the dataset itself: what this one has unpacked may not be there.
        return HFDataset, (self.path.absolute(), self.image_column, self.masks_column)

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, index: int) -> int:
        """The number of the row."""
        return index

    def positions(self, index: int) -> Sequence[int]:
        """The masks of a row are neighbours."""
        return range(self._starts[index], self._starts[index + 1])

    def fingerprint(self) -> dict[str, Any]:
        """A checksum of the files' names, sizes and times, and the columns."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {"predictions": stat_digest(self.path, files), "columns": [self.image_column, self.masks_column]}

    def load(self, index: int) -> Loaded:
        """Decode the image and the masks of a row."""
        row = self._rows[index]
        photo = as_image(_picture(row[self.image_column]))
        size = (photo.shape[1], photo.shape[2])
        values = self._masks(row)
        if None in values:
            raise InvalidInputError(f"expected {len(values)} masks, got none at {values.index(None)}: leave it out")
        if self._mask_bytes:
            masks = [read_mask(io.BytesIO(_bytes(value)), size, f"mask {i}") for i, value in enumerate(values)]
            stack = np.stack(masks) if masks else np.empty((0, *size), bool)
        else:
            stack = rle.decode_batch(values, size)
        return Loaded(photo, join_instances(stack, [{}] * len(stack)))

    def refined(self, index: int, loaded: Loaded, refined: Instances) -> list[bytes]:
        """PNG, or run lengths as JSON."""
        if self._mask_bytes:
            return [encode_png(mask) for mask in refined.masks.numpy(force=True)]
        return [json.dumps(code).encode() for code in refined.to_rle()]

    def unrefined(self, index: int) -> list[bytes]:
        """A sign for each mask: what the row holds is at hand when the output is written."""
        return [AS_IT_CAME] * len(self.positions(index))

    def check_target(self, output: Path) -> Path:
        """A folder that is empty, or to be made."""
        return check_new_folder(output)

    def write(self, target: Path, records: Iterator[bytes], scratch: Path) -> None:
        """As it came: a folder for ``load_from_disk``, or parquet files of the same names and rows."""
        datasets = _library()

        def rows() -> Iterator[dict[str, Any]]:
            for row in self._rows:
                values = [self._value(given, next(records)) for given in self._masks(row)]
                if values:
                    row[self.masks_column] = values if self._is_list else values[0]
                yield row

        # Named, as the library would else name it after the content of the generator, which cannot be pickled.
        try:
            refined = datasets.Dataset.from_generator(
                rows, features=self._features, cache_dir=str(scratch / "cache"), fingerprint="transfiner"
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, OSError):  # a full disk
                raise error.__cause__ from None
            raise
        if not self._files:
            refined.save_to_disk(target)
            return
        target.mkdir()
        start = 0
        for file in self._files:
            stop = start + _parquet_rows(file)
            refined.select(range(start, stop)).to_parquet(target / file.name)
            start = stop

    def _counts(self, dataset: Any) -> list[int]:
        """Count the masks of each row, without decoding them."""
        column = dataset.select_columns([self.masks_column]).with_format("arrow")
        counts: list[int] = []
        for table in column.iter(1000):
            for value in table[self.masks_column]:
                counts.append((len(value) if self._is_list else 1) if value.is_valid else 0)
        return counts

    def _masks(self, row: dict[str, Any]) -> list[Any]:
        value = row[self.masks_column]
        if value is None:
            return []
        return value if self._is_list else [value]

    def _value(self, given: Any, record: bytes) -> Any:
        """A mask as its feature wants it, refined or as the row has it."""
        if record == AS_IT_CAME:
            return given
        return {"bytes": record, "path": None} if self._mask_bytes else json.loads(record)


def _library() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            "expected the package datasets for a dataset of Hugging Face, which is not installed: "
            "pip install 'transfiner-refine[datasets]'"
        ) from error
    return datasets


def _parquet_files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*.parquet") if file.is_file())


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """Turn whatever a damaged dataset raises into one kind of error; the file ``name`` makes it pass for a dataset."""
    try:
        yield
    except Exception as error:  # whatever Arrow, JSON or the library stumbles over
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise InvalidInputError(
            f"expected a dataset in {path} that the package datasets can read, got {type(cause).__name__}: {reason}; "
            f"save it again, or remove {name} if the folder is none"
        ) from error


def _mask_kind(datasets: Any, feature: Any, name: str) -> tuple[bool, bool]:
    """Whether masks are images, and whether a row has a list of them."""
    item = feature.feature if isinstance(feature, datasets.List) else feature
    if isinstance(item, datasets.Image):
        return True, item is not feature
    if item is not feature and isinstance(item, dict) and set(item) == {"size", "counts"}:
        counts = item["counts"]
        if isinstance(counts, datasets.Value) and counts.dtype in ("string", "large_string", "binary", "large_binary"):
            return False, True
    raise InvalidInputError(
        f"expected the column {name!r} to be Image, List(Image), or a List of size and compressed counts, got {feature}"
    )


def _undecoded(datasets: Any, features: Any) -> Any:
    """The same features, with images as bytes."""

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(plain(feature.feature), length=feature.length)
        return feature

    return datasets.Features({name: plain(feature) for name, feature in features.items()})


def _bytes(value: dict[str, Any]) -> bytes:
    """The content of an image that is stored in the dataset, or beside it."""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _picture(value: dict[str, Any] | None) -> Image.Image:
    try:
        with Image.open(io.BytesIO(_bytes(value or {"bytes": b""}))) as image:
            image.load()
    except PILLOW_ERRORS as error:
        raise InvalidInputError(f"expected an image that Pillow can read, got: {error}") from error
    return image


def _parquet_rows(file: Path) -> int:
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

    return pq.ParquetFile(file).metadata.num_rows
