"""How a detector in training is judged: average precision of its own masks and of the refined ones.

N instances of a photo.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from transfiner_refine.adapters.joint import RefinedDetector
from transfiner_refine.adapters.protocol import Adapter
from transfiner_refine.data.coco import ImageId, Result
from transfiner_refine.data.photos import PhotoSet
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.coco_metrics import average_precision
from transfiner_refine.evaluation.ground_truth import load_ground_truth
from transfiner_refine.inputs import as_image
from transfiner_refine.training.processes import map_shared
from transfiner_refine.types import Instances


class DetectorValidation:
    """Judges a detector with its refiner on photos that training never sees; processes share them out.

    Args:
        photos: The photos.
        annotations: Their COCO annotations, crowds included.

    Raises:
        InvalidInputError: If there is no object on them.
    """

    def __init__(self, photos: PhotoSet, annotations: Path) -> None:
        if not photos.count:
            raise InvalidInputError(
                f"expected at least one object to validate on, got {len(photos)} photos without: add annotated photos"
            )
        self.photos = photos
        self.truth = load_ground_truth(annotations, only=photos.file_names)
        self.annotated = {entry["category_id"] for entry in photos.data.annotations}

    def __call__(self, model: RefinedDetector) -> dict[str, float]:
        """Judge a model, which is left in evaluation mode.

        Returns:
            ``mask_ap`` and ``boundary_ap`` of the refined masks, in [0, 1], and the same of the ``_coarse`` ones;
            ``score``, the sum of the first two.
        """
        model.eval()
        pairs = map_shared(lambda position: self._results(model, position), range(len(self.photos)))
        record = {}
        for suffix, parts in zip(("_coarse", ""), zip(*pairs, strict=True), strict=True):
            # Results of other categories change no figure, and to be alone with them would be an error of its own.
            results = [entry for part in parts for entry in part if entry["category_id"] in self.annotated]
            record[f"mask_ap{suffix}"] = average_precision(self.truth, results).ap
            record[f"boundary_ap{suffix}"] = average_precision(self.truth, results, "boundary").ap
        return record | {"score": record["mask_ap"] + record["boundary_ap"]}

    def _results(self, model: RefinedDetector, position: int) -> tuple[list[Result], list[Result]]:
        """COCO results of a photo, coarse and refined."""
        record = self.photos.data.images[position]
        predictions = model.adapter.detect([as_image(self.photos.data.path_of(record))])
        coarse, refined = predictions[0].instances, model.refine(predictions)[0]
        # The refined masks differ in their pixels alone; what both need besides, the coarse ones have.
        both = (coarse, replace(coarse, masks=refined.masks))
        first, second = (coco_results(model.adapter, instances, record["id"]) for instances in both)
        return first, second


def coco_results(adapter: Adapter, instances: Instances, image_id: ImageId) -> list[Result]:
    """A detector's instances as COCO results, in the category ids of its data set.

    Args:
        adapter: The detector's, which knows its categories.
        instances: With labels; masks of probabilities are cut at one half.
        image_id: The image's id in the data set.

    Returns:
        N results at most: a label beyond the categories has none.
    """
    assert adapter.categories is not None and instances.labels is not None
    ids = torch.tensor([category["id"] for category in adapter.categories], device=instances.labels.device)
    places = instances.labels - adapter.first_label
    known = ((places >= 0) & (places < len(ids))).nonzero()[:, 0]
    chosen = instances[known]
    masks = chosen.masks if chosen.masks.dtype == torch.bool else chosen.masks >= 0.5
    return replace(chosen, masks=masks, labels=ids[places[known]]).to_coco(image_id)
