"""Objects for training from what a detector found: those alone that the teacher is sure of, and nobody annotated."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_crops import rectangle

from transfiner_refine.functional.rle import decode, encode

SIZE = (200, 300)


@pytest.fixture
def label(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("label_detections")


def detection(box: tuple[int, int, int, int], score: float = 0.9) -> dict[str, Any]:
    """A detection whose mask is its box, xyxy."""
    x0, y0, x1, y1 = box
    return {
        "image_id": 7,
        "category_id": 3,
        "score": score,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": encode(rectangle(SIZE, box)[None])[0],
    }


class Teacher:
    """Answers with the box made smaller by each of three steps; the second is the one it is sure of."""

    def __init__(self, expected: float = 0.95, steps: tuple[int, int, int] = (0, 4, 8)):
        self.expected, self.steps, self.asked = expected, steps, []

    def __call__(self, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x0, y0, x1, y1 = (int(v) for v in box)
        self.asked.append((x0, y0, x1, y1))
        masks = [rectangle(SIZE, (x0 + s, y0 + s, x1 - s, y1 - s)) for s in self.steps]
        return np.stack(masks), np.array([0.5, self.expected, 0.6])


def test_a_new_object_is_what_the_teacher_thinks_best(label: ModuleType):
    known = rectangle(SIZE, (200, 20, 280, 180))
    before = known.copy()
    found, asked = label.found_objects([detection((20, 20, 100, 100))], known, Teacher())
    assert asked == 1 and len(found) == 1
    assert (decode(found[0]["segmentation"], SIZE) == rectangle(SIZE, (24, 24, 96, 96))).all()
    assert found[0]["bbox"] == [24, 24, 72, 72] and found[0]["area"] == 72 * 72
    assert (found[0]["image_id"], found[0]["category_id"], found[0]["iscrowd"]) == (7, 3, 0)
    assert (known == before).all()


def test_annotated_small_and_unlikely_detections_are_not_asked_about(label: ModuleType):
    known = rectangle(SIZE, (0, 0, 80, 200))
    others = [detection((10, 10, 90, 90)), detection((150, 10, 190, 50)), detection((150, 60, 280, 190), score=0.2)]
    teacher = Teacher()
    assert label.found_objects(others, known, teacher) == ([], 0)
    assert teacher.asked == []


def test_an_object_is_found_once_by_the_best_detection(label: ModuleType):
    twice = [detection((22, 20, 100, 100), score=0.5), detection((20, 20, 100, 100), score=0.8)]
    teacher = Teacher()
    found, asked = label.found_objects(twice, np.zeros(SIZE, bool), teacher)
    assert (len(found), asked) == (1, 1)
    assert teacher.asked == [(20, 20, 100, 100)]


@pytest.mark.parametrize("teacher", [Teacher(expected=0.8), Teacher(steps=(0, 15, 20))], ids=["unsure", "elsewhere"])
def test_answers_that_are_unsure_or_unlike_the_detection_are_dropped(label: ModuleType, teacher: Teacher):
    assert label.found_objects([detection((20, 20, 100, 100))], np.zeros(SIZE, bool), teacher) == ([], 1)


def test_a_photo_without_detections_has_no_objects(label: ModuleType):
    assert label.found_objects([], np.zeros(SIZE, bool), Teacher()) == ([], 0)
