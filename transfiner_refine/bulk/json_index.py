"""Where the entries of a COCO results file are, so that they can be read one by one: the file may exceed memory."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from transfiner_refine.data.coco import ImageId, entry_fault, load_results
from transfiner_refine.errors import InvalidInputError

CHUNK = 1 << 22
"""Bytes read at once."""

SPACE = re.compile(r"[ \t\n\r]*")


class ResultsIndex:
    """Byte ranges of a results file's entries, and which image each is of.

    Attributes:
        image_ids: Images in the order of their first entry.
        ranges: ``(E, 2)`` int64, first byte of each entry and the one after its last.
        entries: ``(E,)`` int64, positions of all entries, those of one image together and in the order of the file.
        starts: ``(images + 1,)`` int64, where in ``entries`` each image begins.

    Raises:
        InvalidInputError: As :func:`~transfiner_refine.data.coco.load_results` does.
    """

    def __init__(self, path: Path):
        numbers: dict[ImageId, int] = {}
        images, ranges = array("q"), array("q")
        try:
            with path.open("rb") as file:
                for index, (entry, start, end) in enumerate(_scan(file)):
                    if fault := entry_fault(entry):
                        raise InvalidInputError(f"{path}, entry {index}: {fault}")
                    images.append(numbers.setdefault(entry["image_id"], len(numbers)))
                    ranges.extend((start, end))
        except InvalidInputError:
            raise
        except RecursionError:
            raise InvalidInputError(f"expected a JSON file, got {path}, which is nested too deeply") from None
        except (OSError, ValueError):  # no JSON, no UTF-8, or a number of too many digits
            load_results(path)  # raises the error of whoever reads the file at once
            raise InvalidInputError(f"expected JSON in UTF-8 without a byte order mark, got {path}") from None
        image_of = np.array(images, np.int64)
        self.image_ids = list(numbers)
        self.ranges: NDArray[np.int64] = np.array(ranges, np.int64).reshape(-1, 2)
        self.entries: NDArray[np.int64] = np.argsort(image_of, kind="stable")
        self.starts: NDArray[np.int64] = np.append(0, np.bincount(image_of, minlength=len(numbers)).cumsum())

    def of_image(self, number: int) -> list[int]:
        """Positions of one image's entries."""
        return self.entries[self.starts[number] : self.starts[number + 1]].tolist()


def _scan(file: BinaryIO) -> Iterator[tuple[Any, int, int]]:
    """Parse a JSON list item by item; each with its first byte and the one after its last.

    Raises:
        json.JSONDecodeError: If it is no JSON list.
    """
    decoder = json.JSONDecoder()
    # As Latin-1 every byte is one character, so that places in the text are places in the file; what JSON is made of
    # is ASCII, and the bytes of anything else lie within strings.
    text, place, passed = "", 0, 0  # place: in the text; passed: bytes before the text

    def more() -> bool:
        nonlocal text, place, passed
        # As much again as is waiting: an entry of any length is parsed a bounded number of times.
        chunk = file.read(max(CHUNK, len(text) - place)).decode("latin-1")
        passed += place
        text, place = text[place:] + chunk, 0
        return bool(chunk)

    def next_sign() -> str:
        nonlocal place
        while True:
            place = SPACE.match(text, place).end()  # type: ignore[union-attr]
            if place < len(text):
                return text[place]
            if not more():
                return ""

    def take(signs: str) -> str:
        nonlocal place
        sign = next_sign()
        if not sign or sign not in signs:
            raise json.JSONDecodeError(f"expected one of {signs}", text, place)
        place += 1
        return sign

    take("[")
    separator = take("]") if next_sign() == "]" else ","
    while separator == ",":
        next_sign()
        while True:
            try:
                item, end = decoder.raw_decode(text, place)
                break
            except json.JSONDecodeError:
                if not more():
                    raise
        if not text[place:end].isascii():
            item = json.loads(text[place:end].encode("latin-1").decode("utf-8"))
        yield item, passed + place, passed + end
        place = end
        separator = take(",]")
    if next_sign():
        raise json.JSONDecodeError("expected nothing after the list", text, place)
