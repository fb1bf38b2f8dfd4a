"""Average precision: against pycocotools, against its definition, against the lvis package, and at the border."""

import copy
import importlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_cases import CATEGORIES, coco_set, lvis_set, slow_average_precision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transfiner_refine.data.coco import load_results
from transfiner_refine.errors import InvalidInputError, MissingDependencyError
from transfiner_refine.evaluation import average_precision, load_ground_truth, load_lvis
from transfiner_refine.evaluation.lvis import COCO_IDS
from transfiner_refine.functional.rle import decode, encode

pytest.importorskip("faster_coco_eval", reason="average precision needs the extra eval")

NAMES = ("ap", "ap50", "ap75", "small", "medium", "large")


def write(folder: Path, value: Any, name: str = "annotations.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(value))
    return path


def by_pycocotools(annotations: dict[str, Any], results: list[dict[str, Any]], any_category: bool) -> dict[str, float]:
    coco: Any = COCO()  # the type stubs know files alone
    coco.dataset = copy.deepcopy(annotations)
    coco.createIndex()
    # Without boxes: pycocotools would take their area for that of the masks.
    found = [{key: x[key] for key in x if key not in ("bbox", "soft28")} for x in copy.deepcopy(results)]
    evaluation = COCOeval(coco, coco.loadRes(found), "segm")
    evaluation.params.useCats = not any_category
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: math.nan if x == -1 else x for name, x in zip(NAMES, evaluation.stats[:6], strict=True)}


@pytest.mark.parametrize("any_category", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mask_ap_agrees_with_pycocotools(tmp_path, seed, any_category):
    annotations, results = coco_set(seed)
    results.sort(key=lambda x: x["category_id"])  # as pycocotools ranks equal scores of several categories
    truth = load_ground_truth(write(tmp_path, annotations))
    if any_category:
        truth = truth.regardless_of_category()
    found = asdict(average_precision(truth, results))
    assert found == pytest.approx(by_pycocotools(annotations, results, any_category), abs=1e-6, nan_ok=True)
    assert 0.1 < found["ap"] < found["ap50"] < 0.95
    assert len(set(found.values())) == 6 or any_category


def test_mask_ap_agrees_with_pycocotools_on_photos(data_root):
    folder = data_root / "coco_train"
    results = load_results(folder / "detections.json")
    expected = by_pycocotools(json.loads((folder / "annotations.json").read_text()), results, False)
    found = average_precision(load_ground_truth(folder / "annotations.json"), results)
    assert asdict(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_slow_computation_is_that_of_pycocotools(seed):
    annotations, results = coco_set(seed)
    expected = by_pycocotools(annotations, results, False)
    assert slow_average_precision(annotations, results, None) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(("seed", "dilation"), [(0, 0.02), (1, 0.02), (2, 0.005), (3, 0.05)])
def test_boundary_ap_agrees_with_its_definition(tmp_path, seed, dilation):
    annotations, results = coco_set(seed)
    truth = load_ground_truth(write(tmp_path, annotations))
    found = asdict(average_precision(truth, results, "boundary", dilation))
    assert found == pytest.approx(slow_average_precision(annotations, results, dilation), abs=1e-6, nan_ok=True)
    assert found["ap"] < average_precision(truth, results).ap  # shifted masks lose their boundary first


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lvis_ap_agrees_with_the_lvis_package(tmp_path, seed, monkeypatch):
    pytest.importorskip("lvis", reason="needs the package lvis: pip install --no-deps lvis, its OpenCV is another one")
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 uses the name that numpy 1.24 dropped
    from lvis import LVIS, LVISEval, LVISResults  # pyright: ignore[reportMissingImports]

    annotations, results = coco_set(seed)
    lvis_path = write(tmp_path, lvis_set(annotations, seed), "lvis.json")
    truth = load_ground_truth(write(tmp_path, annotations))
    found = average_precision(load_lvis(lvis_path, truth), results)

    # The package knows neither COCO's ids nor that some of the images were not predicted on.
    lvis_id = {category: 1000 - category for category in CATEGORIES}
    document = json.loads(lvis_path.read_text())
    document["images"] = [image for image in document["images"] if image["id"] != 99]
    document["annotations"] = [x for x in document["annotations"] if x["image_id"] != 99 and x["category_id"] != 5]
    reference = LVIS(str(write(tmp_path, document, "reference.json")))
    renamed = [{**x, "category_id": lvis_id[x["category_id"]]} for x in results]
    evaluation = LVISEval(reference, LVISResults(reference, str(write(tmp_path, renamed, "results.json"))), "segm")
    evaluation.run()
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    values = [evaluation.results[key] for key in keys]
    expected = {name: math.nan if x == -1 else x for name, x in zip(NAMES, values, strict=True)}
    assert asdict(found) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    # The federated rules matter here: COCO's would give another figure.
    crowds_count = [{**x, "iscrowd": 0} for x in annotations["annotations"]]
    plain = load_ground_truth(write(tmp_path, {**annotations, "annotations": crowds_count}, "plain.json"))
    assert abs(average_precision(plain, results).ap - found.ap) > 0.005


class TestFederated:
    """One dog in one image; a cat's mask is wrong or not, by what the annotations say about cats."""

    @pytest.fixture
    def files(self, tmp_path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        dog = np.zeros((2, 40, 40), bool)
        dog[0, 5:20, 5:20] = dog[1, 22:37, 22:37] = True
        codes = encode(dog)
        image = {"id": 1, "file_name": "1.jpg", "height": 40, "width": 40}
        coco = {"images": [image], "annotations": [], "categories": [{"id": 18}]}
        coco["annotations"] = [{"id": 1, "image_id": 1, "category_id": 18, "segmentation": codes[0]}]
        lvis = {
            "images": [{**image, "neg_category_ids": [], "not_exhaustive_category_ids": []}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 377, "segmentation": codes[0]}],
            "categories": [{"id": 377, "synset": "dog.n.01"}, {"id": 225, "synset": "cat.n.01"}],
        }
        results = [
            {"image_id": 1, "category_id": 18, "segmentation": codes[1], "score": 0.9},  # no dog
            {"image_id": 1, "category_id": 18, "segmentation": codes[0], "score": 0.8},
        ]
        return coco, lvis, results

    def lvis_ap(self, folder: Path, coco: Any, lvis: Any, results: Any) -> float:
        truth = load_lvis(write(folder, lvis, "lvis.json"), load_ground_truth(write(folder, coco)))
        return average_precision(truth, results).ap

    def test_a_false_result_counts_if_all_objects_are_annotated(self, tmp_path, files):
        assert self.lvis_ap(tmp_path, *files) == pytest.approx(0.5)  # precision at every recall

    def test_a_false_result_does_not_count_if_some_objects_are_not_annotated(self, tmp_path, files):
        files[1]["images"][0]["not_exhaustive_category_ids"] = [377]
        assert self.lvis_ap(tmp_path, *files) == pytest.approx(1)

    def test_a_category_nobody_looked_for_does_not_count(self, tmp_path, files):
        coco, lvis, results = files
        image = {"id": 2, "file_name": "2.jpg", "height": 40, "width": 40}
        coco["images"].append(image)
        lvis["images"].append({**image, "neg_category_ids": [], "not_exhaustive_category_ids": []})
        false = [{**results[0], "image_id": 2}, results[1]]
        assert self.lvis_ap(tmp_path, coco, lvis, false) == pytest.approx(1)
        lvis["images"][1]["neg_category_ids"] = [377]
        assert self.lvis_ap(tmp_path, coco, lvis, false) == pytest.approx(0.5)

    def test_images_without_lvis_annotations_are_passed_over(self, tmp_path, files):
        coco, lvis, results = files
        coco["images"].append({"id": 2, "file_name": "2.jpg", "height": 50, "width": 50})
        other = {**results[0], "image_id": 2, "segmentation": encode(np.ones((1, 50, 50), bool))[0]}
        assert self.lvis_ap(tmp_path, coco, lvis, [other, *results]) == pytest.approx(0.5)

    def test_a_file_with_coco_ids_is_read_as_it_is(self, tmp_path, files):
        coco, lvis, results = files
        lvis["annotations"][0]["category_id"] = lvis["categories"][0]["id"] = 18
        lvis["categories"][1]["id"] = 17
        assert self.lvis_ap(tmp_path, coco, lvis, results) == pytest.approx(0.5)

    def test_300_results_of_all_categories_count(self, tmp_path, files):
        coco, lvis, (false, right) = files
        cat = {**false, "category_id": 17}
        assert self.lvis_ap(tmp_path, coco, lvis, [cat] * 299 + [right]) == pytest.approx(1)
        assert self.lvis_ap(tmp_path, coco, lvis, [cat] * 300 + [right]) == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda lvis: lvis["images"][0].update(id=9), "got none of 1"),
            (lambda lvis: lvis["images"][0].update(height=41), r"got \(40, 40\) and \(41, 40\) for image 1"),
            (lambda lvis: lvis["images"][0].pop("neg_category_ids"), 'list "neg_category_ids" in every image'),
            (lambda lvis: lvis["categories"].clear(), "got none that COCO has"),
            (lambda lvis: lvis.pop("categories"), "got categories missing or malformed"),
        ],
    )
    def test_what_is_no_lvis_file_of_these_images(self, tmp_path, files, change, message):
        change(files[1])
        with pytest.raises(InvalidInputError, match=message):
            self.lvis_ap(tmp_path, *files)

    def test_categories_cannot_be_dropped(self, tmp_path, files):
        truth = load_lvis(write(tmp_path, files[1], "lvis.json"), load_ground_truth(write(tmp_path, files[0])))
        with pytest.raises(InvalidInputError, match="expected COCO annotations to pass over categories"):
            truth.regardless_of_category()
        images = load_ground_truth(write(tmp_path, files[0])).regardless_of_category()
        with pytest.raises(InvalidInputError, match="expected categories with LVIS annotations"):
            load_lvis(tmp_path / "lvis.json", images)


def test_every_category_of_coco_has_a_synset():
    # The ids 1 to 90 without the ten that COCO never used (Lin et al. 2014, Sec. 3.1: 91 categories, 80 released).
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert sorted(COCO_IDS.values()) == [i for i in range(1, 91) if i not in unused]


def test_perfect_results_and_none(tmp_path):
    annotations, _ = coco_set(0)
    annotations["annotations"] = [{**x, "iscrowd": 0} for x in annotations["annotations"]]
    perfect = [{**x, "score": 0.5} for x in annotations["annotations"]]
    truth = load_ground_truth(write(tmp_path, annotations))
    for overlap in ("mask", "boundary"):
        assert set(asdict(average_precision(truth, perfect, overlap)).values()) == {1.0}
        assert set(asdict(average_precision(truth, [], overlap)).values()) == {0.0}
    nothing = replace(truth, objects=[])
    assert all(math.isnan(value) for value in asdict(average_precision(nothing, [])).values())


def test_ids_and_missing_areas_do_not_matter(tmp_path):
    annotations, results = coco_set(1)
    expected = average_precision(load_ground_truth(write(tmp_path, annotations)), results)
    for entry in [*annotations["annotations"], *results]:
        entry["image_id"] = f"photo {entry['image_id']:03}"
        entry.pop("area", None)
    for image in annotations["images"]:
        image["id"] = f"photo {image['id']:03}"
    assert average_precision(load_ground_truth(write(tmp_path, annotations)), results) == expected


@pytest.mark.parametrize("null", [{"area": None}, {"iscrowd": None}])
def test_null_is_no_value(tmp_path, null):
    annotations, _ = coco_set(1)
    for entry in annotations["annotations"]:
        entry["iscrowd"] = 0
    expected = load_ground_truth(write(tmp_path, annotations)).objects  # the areas of the set are those of its masks
    annotations["annotations"] = [{**entry, **null} for entry in annotations["annotations"]]
    assert load_ground_truth(write(tmp_path, annotations, "null.json")).objects == expected


def test_the_area_is_that_of_the_mask_whatever_the_box(tmp_path):
    annotations, results = coco_set(1)
    truth = load_ground_truth(write(tmp_path, annotations))
    boxed = [{**x, "bbox": [0, 0, 1000, 1000], "area": 1.0} for x in results]
    assert average_precision(truth, boxed) == average_precision(truth, results)


def test_polygons_and_plain_run_lengths_are_understood(tmp_path):
    mask = np.zeros((30, 40), bool)
    mask[5:25, 10:30] = True
    polygon = [[10, 5, 30, 5, 30, 25, 10, 25]]
    assert np.array_equal(decode(polygon, (30, 40)), mask)
    plain = {"size": [30, 40], "counts": [305, *[20, 10] * 19, 20, 305]}
    annotations = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 30, "width": 40}],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 1, "segmentation": polygon}],
        "categories": [{"id": 1}],
    }
    truth = load_ground_truth(write(tmp_path, annotations))
    result = {"image_id": 1, "category_id": 1, "score": 1, "segmentation": plain}
    assert average_precision(truth, [result], "boundary").ap == 1
    assert truth.objects[0]["area"] == 400


def test_inputs_are_not_changed(tmp_path):
    annotations, results = coco_set(0)
    truth = load_ground_truth(write(tmp_path, annotations))
    before = copy.deepcopy((truth.objects, results))
    for overlap in ("mask", "boundary", "mask"):
        average_precision(truth, results, overlap)
    assert (truth.objects, results) == before


def test_a_part_of_the_images(tmp_path):
    annotations, results = coco_set(0)
    path = write(tmp_path, annotations)
    part = {**annotations, "images": [x for x in annotations["images"] if x["id"] in (12, 3)]}
    part["annotations"] = [x for x in annotations["annotations"] if x["image_id"] in (12, 3)]
    expected = average_precision(
        load_ground_truth(write(tmp_path, part, "part.json")), [x for x in results if x["image_id"] in (12, 3)]
    )
    found = average_precision(load_ground_truth(path, only=["3.jpg", "12.jpg"]), results)
    assert asdict(found) == pytest.approx(asdict(expected), abs=0, nan_ok=True)
    with pytest.raises(InvalidInputError, match=r"got 1 unknown: 'none.jpg'"):
        load_ground_truth(path, only=["3.jpg", "none.jpg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, "entry 1: expected an image_id of the annotations, got 5"),
        ({"score": None}, "entry 1: expected a score"),
        ({"score": float("nan")}, "entry 1: expected a score"),
        ({"category_id": None}, "entry 1: expected an integer category_id, got None"),
        ({"segmentation": {"size": [9, 9], "counts": "zz"}}, "entry 1: expected run lengths of size"),
    ],
)
def test_results_that_cannot_be_measured(tmp_path, change, message):
    annotations, results = coco_set(0)
    results[1] |= change
    with pytest.raises(InvalidInputError, match=message):
        average_precision(load_ground_truth(write(tmp_path, annotations)), results)


def test_results_of_other_categories_alone_are_no_zero(tmp_path):
    annotations, results = coco_set(0)
    truth = load_ground_truth(write(tmp_path, annotations))
    results = [{**x, "category_id": x["category_id"] + 100} for x in results]
    with pytest.raises(InvalidInputError, match=r"1, 18, 3, got 101, 103, 118.*--class-agnostic"):
        average_precision(truth, results)
    assert average_precision(truth.regardless_of_category(), results).ap > 0


@pytest.mark.parametrize("any_category", [False, True])
def test_results_where_nothing_is_annotated(tmp_path, any_category):
    annotations, results = coco_set(0)
    nothing = {**annotations, "annotations": []}
    truth = load_ground_truth(write(tmp_path, nothing))
    if any_category:
        truth = truth.regardless_of_category()
    assert all(math.isnan(value) for value in by_pycocotools(nothing, results, any_category).values())
    for overlap in ("mask", "boundary"):
        assert all(math.isnan(value) for value in asdict(average_precision(truth, results, overlap)).values())


def test_lvis_results_where_no_category_is_known(tmp_path):
    annotations, results = coco_set(0)
    lvis_path = write(tmp_path, lvis_set(annotations, 0), "lvis.json")
    truth = load_lvis(lvis_path, load_ground_truth(write(tmp_path, annotations)))
    assert truth.federation is not None
    open_questions: dict[Any, frozenset[int]] = dict.fromkeys(truth.sizes, frozenset())
    unknown = replace(truth, objects=[], federation=replace(truth.federation, absent=open_questions))
    assert all(math.isnan(value) for value in asdict(average_precision(unknown, results)).values())


def test_images_without_a_name_cannot_be_chosen_by_it(tmp_path):
    annotations, _ = coco_set(0)
    annotations["images"][2].pop("file_name")
    path = write(tmp_path, annotations)
    assert len(load_ground_truth(path).sizes) == 6
    with pytest.raises(InvalidInputError, match=r'expected a "file_name" in every one of "images" .*30.*: add it, or'):
        load_ground_truth(path, only=["12.jpg"])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "got a list"),
        ({"images": [], "annotations": []}, "got categories missing"),
        ({"images": [{}], "annotations": [], "categories": []}, 'expected an "id" in every one of "images"'),
        ({"images": [{"id": 1, "height": 3}], "annotations": [], "categories": []}, "got 3 and None for image 1"),
        (
            {"images": [], "annotations": [{"image_id": 1}], "categories": []},
            "annotation 0: expected .*, got no category_id and no segmentation",
        ),
    ],
)
def test_what_is_no_annotations_file(tmp_path, document, message):
    with pytest.raises(InvalidInputError, match=message):
        load_ground_truth(write(tmp_path, document))


def test_without_the_library_the_extra_is_named(tmp_path, uninstall):
    annotations, results = coco_set(0)
    uninstall("faster_coco_eval")
    with pytest.raises(MissingDependencyError, match=r"pip install 'transfiner-refine\[eval\]'"):
        average_precision(load_ground_truth(write(tmp_path, annotations)), results)


def test_the_library_waits_until_it_is_needed():
    module = importlib.import_module("transfiner_refine.evaluation.coco_metrics")
    assert not hasattr(module, "COCOeval_faster")
