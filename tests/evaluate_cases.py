"""Small sets of drawn masks, as COCO and as LVIS files, and average precision computed slowly from its definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from transfiner_refine.functional.rle import decode, encode

SIZES = ((60, 80), (97, 64), (120, 150), (60, 80), (150, 110), (40, 40))
CATEGORIES = (1, 3, 18, 44)
SYNSETS = {1: "person.n.01", 3: "car.n.01", 18: "dog.n.01", 44: "bottle.n.01"}


def blob(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """An ellipse or a rectangle of any size from a few pixels to the image, at times with a hole."""
    y, x = np.mgrid[: size[0], : size[1]]
    scale = rng.choice([0.08, 0.25, 0.6])
    centre = rng.uniform(0.2, 0.8, 2) * size
    radius = 2 + scale * rng.uniform(0.5, 1, 2) * size
    dy, dx = abs(y - centre[0]) / radius[0], abs(x - centre[1]) / radius[1]
    mask = dy**2 + dx**2 < 1 if rng.random() < 0.5 else np.maximum(dy, dx) < 1
    return mask & ~(np.maximum(dy, dx) < rng.choice([0, 0.4]))


def shift(mask: np.ndarray, dy: int, dx: int) -> np.ndarray:
    return np.roll(mask, (dy, dx), axis=(0, 1))


def coco_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and results: objects of all sizes and crowds; good, poor, double and false masks, many equal scores.

    The images come in no order of their ids, one has no object and one no result.
    """
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image_id, size in zip((12, 7, 30, 3, 25, 18), SIZES, strict=True):
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": size[0], "width": size[1]})
        for _ in range(0 if image_id == 18 else 7):
            mask = blob(rng, size)
            category = int(rng.choice(CATEGORIES[:3]))
            (code,) = encode(mask[None])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "segmentation": code,
                    "area": float(mask.sum()),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(0 if image_id == 25 else int(rng.integers(0, 3))):
                found = shift(mask, *rng.integers(-3, 4, 2)) if rng.random() < 0.8 else blob(rng, size)
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category if rng.random() < 0.9 else int(rng.choice(CATEGORIES)),
                        "segmentation": encode(found[None])[0],
                        "score": float(rng.integers(1, 20)) / 20,
                    }
                )
    categories = [{"id": category, "name": str(category)} for category in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def lvis_set(coco: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same objects as LVIS would have them: other ids, categories that COCO lacks, and open questions by image."""
    rng = np.random.default_rng(seed)
    lvis_id = {category: 1000 - category for category in CATEGORIES}
    other = [{"id": 5, "synset": "zucchini.n.02", "frequency": "c"}]
    images = [{**image, "neg_category_ids": [], "not_exhaustive_category_ids": []} for image in coco["images"]]
    for image in images:
        del image["file_name"]  # LVIS has links instead
        held = {x["category_id"] for x in coco["annotations"] if x["image_id"] == image["id"]}
        absent = [lvis_id[category] for category in CATEGORIES if category not in held and rng.random() < 0.5]
        image["neg_category_ids"] = [5, *absent]
        image["not_exhaustive_category_ids"] = [lvis_id[category] for category in sorted(held) if rng.random() < 0.4]
    annotations = [
        {
            **{key: x[key] for key in ("id", "image_id", "segmentation", "area")},
            "category_id": lvis_id[x["category_id"]],
        }
        for x in coco["annotations"]
    ]
    annotations.append({**annotations[0], "id": 10_000, "category_id": 5})
    images.append({**images[0], "id": 99})  # LVIS's validation images are not all COCO's
    annotations.append({**annotations[0], "id": 10_001, "image_id": 99})
    categories = [{"id": lvis_id[x], "synset": SYNSETS[x], "frequency": "f"} for x in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories + other}


def slow_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask with background, or the outside of the image, within ``width`` rows and columns."""
    height, columns = mask.shape
    padded = np.pad(mask, width)
    inner = np.ones_like(mask)
    for dy in range(2 * width + 1):
        for dx in range(2 * width + 1):
            inner &= padded[dy : dy + height, dx : dx + columns]
    return mask & ~inner


def slow_overlap(found: np.ndarray, true: np.ndarray, is_crowd: bool, dilation: float | None) -> float:
    """Mask IoU, or the lower of mask IoU and Boundary IoU; the union with a crowd is the result alone."""

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        union = a.sum() if is_crowd else (a | b).sum()
        return (a & b).sum() / union if union else 0.0

    if dilation is None or is_crowd:
        return iou(found, true)
    width = max(1, round(dilation * math.hypot(*found.shape)))
    return min(iou(found, true), iou(slow_boundary(found, width), slow_boundary(true, width)))


AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


def slow_average_precision(
    coco: dict[str, Any], results: list[dict[str, Any]], dilation: float | None
) -> dict[str, float]:
    """COCO's average precision from its definition, in plain loops; of boundaries if ``dilation`` is given."""
    ids = sorted(image["id"] for image in coco["images"])
    size = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    table: dict[tuple[str, int], list[float]] = {(area, i): [] for area in AREAS for i in range(10)}
    masks = {id(x): decode(x["segmentation"], size[x["image_id"]]) for x in [*coco["annotations"], *results]}
    for category in CATEGORIES:
        per_image = []
        for image_id in ids:
            true = [x for x in coco["annotations"] if (x["image_id"], x["category_id"]) == (image_id, category)]
            found = [x for x in results if (x["image_id"], x["category_id"]) == (image_id, category)]
            found = sorted(found, key=lambda x: -x["score"])[:100]
            overlaps = [
                [slow_overlap(masks[id(f)], masks[id(t)], bool(t["iscrowd"]), dilation) for t in true] for f in found
            ]
            per_image.append((true, found, overlaps))
        for area, (least, most) in AREAS.items():
            for i, threshold in enumerate(thresholds):
                judged, wanted = [], 0
                for true, found, overlaps in per_image:
                    ignored = [bool(t["iscrowd"]) or not least <= t["area"] <= most for t in true]
                    wanted += ignored.count(False)
                    taken = [False] * len(true)
                    for f, row in zip(found, overlaps, strict=True):
                        # Objects that count come first; among each kind the best overlap wins, of equals the last.
                        best = None
                        for kind in (False, True):
                            for t, overlap in enumerate(row):
                                free = not taken[t] or true[t]["iscrowd"]
                                if ignored[t] is kind and free and overlap >= min(threshold, 1 - 1e-10):
                                    best = t if best is None or overlap >= row[best] else best
                            if best is not None:
                                break
                        if best is not None:
                            taken[best] = True
                            if not ignored[best]:
                                judged.append((f["score"], True))
                        elif least <= masks[id(f)].sum() <= most:
                            judged.append((f["score"], False))
                if wanted:
                    table[area, i].append(interpolated(judged, wanted))
    mean = {key: sum(values) / len(values) if values else math.nan for key, values in table.items()}
    by_area = {area: sum(mean[area, i] for i in range(10)) / 10 for area in AREAS}
    return {"ap": by_area.pop("all"), "ap50": mean["all", 0], "ap75": mean["all", 5], **by_area}


def interpolated(judged: list[tuple[float, bool]], wanted: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or a higher one."""
    hits = np.cumsum([hit for _, hit in sorted(judged, key=lambda x: -x[0])])
    points = [(n / wanted, n / rank) for rank, n in enumerate(hits, 1)]
    recalls = np.linspace(0, 1, 101)
    return float(np.mean([max((p for r, p in points if r >= recall), default=0.0) for recall in recalls]))
