"""The refiner: any image, boxes and coarse masks in, refined masks out.

N instances of an image, S RoI side. Conversion and validation happen here, once; below are tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from transfiner_refine.arrays import to_tensor
from transfiner_refine.config import RefineOptions, TransfinerConfig
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_boxes, as_image, as_masks, boxes_from_masks
from transfiner_refine.modeling import hub
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.pipeline import Job, Pipeline
from transfiner_refine.types import FeaturePyramid, Instances


class Refiner:
    """Refines coarse masks.

    Attributes:
        model: The network, in evaluation mode.
        config: Its architecture.

    Example:
        >>> refiner = Refiner.from_pretrained()
        >>> refined = refiner.refine("photo.jpg", boxes=boxes, masks=masks)
    """

    def __init__(self, model: RefinerModel):
        self.model = model.eval()

    @property
    def config(self) -> TransfinerConfig:
        """Architecture of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.model.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Refiner:
        """Load a refiner.

        Args:
            name_or_path: None for the model that the package carries (no network), a directory with ``config.json``
                and ``model.safetensors``, or a Hugging Face Hub id ``"org/name"``.
            revision: Branch, tag or commit on the Hub.
            device: Where to put the weights; None for the CPU.
            dtype: Floating dtype of the weights; None for float32.
            cache_dir: Hub cache; None for huggingface_hub's own.
            local_files_only: Whether to use the cache alone.
            token: Hub token, for private and gated repositories.

        Raises:
            WeightsError: If files are missing, damaged, or of another architecture.
        """
        folder = hub.find_model(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        return cls(hub.load_model(folder).to(device=device, dtype=dtype or torch.float32))

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype = torch.float16) -> Path:
        """Write ``config.json``, ``model.safetensors`` and a model card; returns the directory.

        What is loaded again may differ by the rounding of ``dtype``.

        Args:
            directory: Created if needed; an older config and weights are replaced, a model card is kept.
            dtype: How weights are stored: ``torch.float16``, half of their size in memory, ``torch.float32``, or
                ``torch.int8``, a quarter, with a scale for each row.

        Raises:
            InvalidInputError: If ``dtype`` is another one.
            WeightsError: If a weight is not finite, or the directory cannot be made.
        """
        return hub.save_model(self.model, Path(directory), dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload refiner",
    ) -> str:
        """Upload to the Hugging Face Hub; returns the commit's URL.

        Args:
            repo_id: ``"org/name"``, created if needed.
            private: Whether a new repository is private.
            token: Hub token with write access.
            commit_message: Message of the commit.
        """
        return hub.push_model(self.model, repo_id, private=private, token=token, commit_message=commit_message)

    def refine(
        self,
        image: Any = None,
        *,
        boxes: Any = None,
        masks: Any = None,
        mask_frame: Literal["image", "box"] = "image",
        features: FeaturePyramid | None = None,
        image_size: tuple[int, int] | None = None,
        labels: Any = None,
        scores: Any = None,
        options: RefineOptions | None = None,
    ) -> Instances:
        """Refine the masks of one image.

        Args:
            image: Path, PIL image, ``(H, W, 3)`` uint8 RGB array, or ``(3, H, W)`` tensor (uint8, or float in
                [0, 1]). Not needed with ``features``.
            boxes: ``(N, 4)`` xyxy pixels; None takes the boxes of the masks.
            masks: ``(N, H, W)`` bool, uint8 or float probabilities in the image frame; ``(N, S, S)`` probabilities
                with ``mask_frame="box"``; or a list of COCO RLEs or polygons.
            mask_frame: ``"image"`` or ``"box"``.
            features: A detector's own feature pyramid of this one image, for a refiner trained on such features.
            image_size: ``(H, W)``, needed with ``features``.
            labels: ``(N,)`` integers, passed through.
            scores: ``(N,)`` floats, passed through.
            options: Choices of this call.

        Returns:
            Refined instances in the order of the input. Instances with an empty mask or a box outside of the image
            come back unchanged.

        Raises:
            InvalidInputError: If an input cannot be used.
        """
        pipeline = Pipeline(self.model, options or RefineOptions())
        if features is not None:
            if image_size is None:
                raise InvalidInputError("expected image_size=(H, W) with features, got None: pass the image's size")
            self._check_features(features)
            pixels, size = None, image_size
        else:
            if image is None:
                raise InvalidInputError("expected an image or features, got neither: pass one of them")
            pixels = as_image(image)
            size = (pixels.shape[1], pixels.shape[2])
        if masks is None:
            raise InvalidInputError("expected masks to refine, got None: pass the detector's coarse masks")
        coarse = as_masks(masks, size, mask_frame)
        if boxes is None:
            if coarse.frame == "box":
                raise InvalidInputError('expected boxes with mask_frame="box", got None: pass the boxes of the masks')
            boxes = boxes_from_masks(coarse.data, pipeline.options.mask_threshold)
        else:  # what refine() returned for an empty mask can be passed in again
            boxes = as_boxes(boxes, size, zero_ok=True)
        if boxes.shape[0] != coarse.data.shape[0]:
            raise InvalidInputError(
                f"expected one box per mask, got {boxes.shape[0]} boxes and {coarse.data.shape[0]} masks: "
                "pass both in the same order"
            )
        job = pipeline.job(pixels, features, boxes, coarse, size)
        checked = _with_passengers(job, labels, scores)
        pipeline.run([job])
        return _result(pipeline, job, checked)

    def refine_batch(
        self, images: Sequence[Any], instances: Sequence[Instances], *, options: RefineOptions | None = None
    ) -> list[Instances]:
        """Refine the masks of several images, whose sizes may differ.

        Args:
            images: As for :meth:`refine`.
            instances: Coarse instances of each image.
            options: Choices of this call.

        Returns:
            Refined instances of each image, equal to those of :meth:`refine` image by image.

        Raises:
            InvalidInputError: If an input cannot be used, or the two lists differ in length.
        """
        pipeline = Pipeline(self.model, options or RefineOptions())
        images, instances = list(images), list(instances)
        if wrong := [type(x).__name__ for x in instances if not isinstance(x, Instances)]:
            raise InvalidInputError(
                f"expected Instances for each image, got {wrong[0]}: Instances(boxes=..., masks=..., image_size=(H, W))"
            )
        if len(images) != len(instances):
            raise InvalidInputError(
                f"expected one Instances per image, got {len(images)} images and {len(instances)} Instances"
            )
        jobs = []
        for image, coarse in zip(images, instances, strict=True):
            pixels = as_image(image)
            size = (pixels.shape[1], pixels.shape[2])
            if size != coarse.image_size:
                raise InvalidInputError(
                    f"expected Instances of image size {size}, got {coarse.image_size}: pass lists in the same order"
                )
            # What refine() returned for an empty mask can be passed in again.
            boxes = as_boxes(coarse.boxes, size, zero_ok=True)
            jobs.append(pipeline.job(pixels, None, boxes, as_masks(coarse.masks, size), size))
        checked = [_with_passengers(job, x.labels, x.scores) for job, x in zip(jobs, instances, strict=True)]
        pipeline.run(jobs)
        return [_result(pipeline, job, given) for job, given in zip(jobs, checked, strict=True)]

    def _check_features(self, features: FeaturePyramid) -> None:
        config = self.config
        if not isinstance(features, FeaturePyramid):
            raise InvalidInputError(
                f"expected features as a FeaturePyramid, got {type(features).__name__}: "
                "FeaturePyramid(tuple(maps), strides), finest map first"
            )
        if features.batch_size != 1:
            raise InvalidInputError(f"expected features of one image, got a batch of {features.batch_size}")
        if (features.channels, features.strides) != (config.feature_channels, config.strides):
            raise InvalidInputError(
                f"expected features of {config.feature_channels} channels at strides {config.strides}, got "
                f"{features.channels} channels at strides {features.strides}: use the refiner trained on this detector"
            )
        if features.source != config.feature_source:
            raise InvalidInputError(
                f"expected features of {config.feature_source!r}, got features of {features.source!r}: a refiner "
                "understands only the features it was trained on; pass the image, or load the matching refiner"
            )


def _with_passengers(job: Job, labels: Any, scores: Any) -> Instances:
    """Check labels and scores, before the work that they would be lost with, and bring them to the job's device."""

    def there(values: Any, name: str) -> Tensor | None:
        return None if values is None else to_tensor(values, name).detach().to(job.masks.device)

    return Instances(
        boxes=job.boxes,
        masks=job.masks,
        image_size=job.image_size,
        scores=there(scores, "scores"),
        labels=there(labels, "labels"),
    )


def _result(pipeline: Pipeline, job: Job, given: Instances) -> Instances:
    return replace(
        given,
        masks=job.masks,
        probs=job.probs,
        rois=job.rois,
        kept_coarse=job.kept_coarse,
        predicted_gain=job.gain,
        details=pipeline.details(job) if pipeline.options.return_quadtree else None,
    )
