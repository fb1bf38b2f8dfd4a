"""LVIS annotations of COCO's categories: the ground truth of AP*.

Gupta, Dollár, Girshick, *LVIS: A Dataset for Large Vocabulary Instance Segmentation*, CVPR 2019. LVIS annotates
images of COCO again, and more exactly. Its images are not annotated for every category: each lists the categories that
were looked for in vain, and those of which some objects were left out.
"""

from __future__ import annotations

from pathlib import Path

from transfiner_refine.data.coco import Result
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.ground_truth import (
    Federation,
    GroundTruth,
    checked_objects,
    image_sizes,
    load_annotations_document,
)


def load_lvis(path: Path | str, images: GroundTruth) -> GroundTruth:
    """Read LVIS annotations for results of COCO's categories.

    LVIS's categories are told by their WordNet synset; those that COCO does not have are dropped. A file whose
    categories have COCO's ids already is read as it is.

    Args:
        path: LVIS annotations, version 0.5 or 1.
        images: COCO annotations of the images that were predicted on. The two files name images by the same ids; the
            images that both hold are evaluated.

    Returns:
        The annotations, federated.

    Raises:
        InvalidInputError: If the file cannot be read or is not of this form, or has none of the images, or these are
            annotated regardless of category.
    """
    if not images.uses_categories:
        raise InvalidInputError(
            "expected categories with LVIS annotations, which say by category what they leave out, got results matched "
            "regardless of category: drop either one"
        )
    document = load_annotations_document(path)
    shared = [image for image in document["images"] if image["id"] in images.sizes]
    if not shared:
        raise InvalidInputError(
            f"expected images of the COCO annotations in {path}, got none of {len(document['images'])}: give the LVIS "
            "annotations of the same photos"
        )
    sizes = image_sizes(shared, path)
    for image_id, size in sizes.items():
        if size != images.sizes[image_id]:
            raise InvalidInputError(
                f"expected images of one size in both annotations, got {images.sizes[image_id]} and {size} for image "
                f"{image_id!r}: their ids do not mean the same photos"
            )
    coco_id = _coco_ids(document["categories"], path)
    known = [entry for entry in document["annotations"] if entry.get("category_id") in coco_id]
    objects = checked_objects(known, sizes, path)
    return GroundTruth(
        sizes=sizes,
        objects=[{**entry, "category_id": coco_id[entry["category_id"]]} for entry in objects],
        categories=sorted(coco_id.values()),
        left_out=images.left_out.union(images.sizes.keys() - sizes.keys()),
        federation=Federation(
            absent={image["id"]: _known(image, "neg_category_ids", coco_id, path) for image in shared},
            incomplete={image["id"]: _known(image, "not_exhaustive_category_ids", coco_id, path) for image in shared},
        ),
    )


def _coco_ids(categories: list[Result], path: Path | str) -> dict[int, int]:
    """COCO's id of each LVIS category that COCO has."""
    ids = {entry["id"]: COCO_IDS[entry["synset"]] for entry in categories if entry.get("synset") in COCO_IDS}
    if not ids:
        raise InvalidInputError(
            f'expected LVIS categories with a "synset" as "person.n.01" in {path}, got none that COCO has: '
            "give LVIS annotations, not COCO's"
        )
    return ids


def _known(image: Result, field: str, coco_id: dict[int, int], path: Path | str) -> frozenset[int]:
    if not isinstance(image.get(field), list):
        raise InvalidInputError(
            f'expected a list "{field}" in every image of {path}, got {image.get(field)!r} for image {image["id"]!r}: '
            "give LVIS annotations, not COCO's"
        )
    return frozenset(coco_id[category] for category in image[field] if category in coco_id)


COCO_IDS = {
    "person.n.01": 1,
    "bicycle.n.01": 2,
    "car.n.01": 3,
    "motorcycle.n.01": 4,
    "airplane.n.01": 5,
    "bus.n.01": 6,
    "train.n.01": 7,
    "truck.n.01": 8,
    "boat.n.01": 9,
    "traffic_light.n.01": 10,
    "fireplug.n.01": 11,
    "stop_sign.n.01": 13,
    "parking_meter.n.01": 14,
    "bench.n.01": 15,
    "bird.n.01": 16,
    "cat.n.01": 17,
    "dog.n.01": 18,
    "horse.n.01": 19,
    "sheep.n.01": 20,
    "beef.n.01": 21,
    "elephant.n.01": 22,
    "bear.n.01": 23,
    "zebra.n.01": 24,
    "giraffe.n.01": 25,
    "backpack.n.01": 27,
    "umbrella.n.01": 28,
    "bag.n.04": 31,
    "necktie.n.01": 32,
    "bag.n.06": 33,
    "frisbee.n.01": 34,
    "ski.n.01": 35,
    "snowboard.n.01": 36,
    "ball.n.06": 37,
    "kite.n.03": 38,
    "baseball_bat.n.01": 39,
    "baseball_glove.n.01": 40,
    "skateboard.n.01": 41,
    "surfboard.n.01": 42,
    "tennis_racket.n.01": 43,
    "bottle.n.01": 44,
    "wineglass.n.01": 46,
    "cup.n.01": 47,
    "fork.n.01": 48,
    "knife.n.01": 49,
    "spoon.n.01": 50,
    "bowl.n.03": 51,
    "banana.n.02": 52,
    "apple.n.01": 53,
    "sandwich.n.01": 54,
    "orange.n.01": 55,
    "broccoli.n.01": 56,
    "carrot.n.01": 57,
    "frank.n.02": 58,
    "pizza.n.01": 59,
    "doughnut.n.02": 60,
    "cake.n.03": 61,
    "chair.n.01": 62,
    "sofa.n.01": 63,
    "pot.n.04": 64,
    "bed.n.01": 65,
    "dining_table.n.01": 67,
    "toilet.n.02": 70,
    "television_receiver.n.01": 72,
    "laptop.n.01": 73,
    "mouse.n.04": 74,
    "remote_control.n.01": 75,
    "computer_keyboard.n.01": 76,
    "cellular_telephone.n.01": 77,
    "microwave.n.02": 78,
    "oven.n.01": 79,
    "toaster.n.02": 80,
    "sink.n.01": 81,
    "electric_refrigerator.n.01": 82,
    "book.n.01": 84,
    "clock.n.01": 85,
    "vase.n.01": 86,
    "scissors.n.01": 87,
    "teddy.n.01": 88,
    "hand_blower.n.01": 89,
    "toothbrush.n.01": 90,
}
"""WordNet synset of each of COCO's 80 categories: its COCO id. This is the mapping that LVIS publishes."""
