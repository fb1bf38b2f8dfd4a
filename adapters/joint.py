"""A detector and its refiner in one module: refined masks in evaluation, joint losses in training, one directory.

B images, N instances of an image, R RoIs of a batch, S RoI side, H W image pixels.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

import transfiner_refine
from transfiner_refine.adapters.protocol import Adapter, JointOptions, Prediction
from transfiner_refine.adapters.saving import DETECTOR, LATERALS, save_parts
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.photos import PhotoSample
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.paste import crop_box_masks, crop_masks, paste
from transfiner_refine.functional.quadtree import rank_in_roi
from transfiner_refine.inputs import CoarseMasks
from transfiner_refine.modeling.model import IMAGE_ENCODER, RefinerModel
from transfiner_refine.pipeline import Job, Pipeline
from transfiner_refine.training.losses import refinement_losses
from transfiner_refine.types import FeaturePyramid, Instances

LABEL_MARGIN = 0.1
"""How far beyond the threshold a probability of the wrong side is put, as a share of the way to 0 or 1."""


class RefinedDetector(nn.Module):
    """A detector whose masks are refined; the base of each host's own, which adds :meth:`forward`.

    A host's ``forward`` takes what its detector takes. In evaluation it calls ``self.adapter.detect`` and
    :meth:`refine`, and puts the masks into the host's output. In training it calls :meth:`check_trainable`, runs the
    detector, and for the RoIs that the host trained its mask head on calls, in this order, :meth:`sample`,
    :meth:`rois`, a crop of the coarse masks and :func:`crop_truth` of the true ones (``functional/paste.py``), and
    :meth:`refinement_losses`.

    Attributes:
        detector: The host's detector, the same object that the adapter was made for.
        refiner_model: The refiner's weights.
        laterals: The adapter's, or None.
        adapter: The adapter.
        joint: What was chosen in ``with_refiner``.
    """

    def __init__(self, adapter: Adapter, refiner_model: RefinerModel, joint: JointOptions) -> None:
        super().__init__()
        self.detector = adapter.model
        self.refiner_model = refiner_model
        self.laterals = adapter.laterals if self.uses_features else None
        self.adapter = adapter
        self.joint = joint
        self._frozen = {"refiner": [self.detector], "heads": [adapter.backbone], "all": []}[joint.train]
        for module in self._frozen:
            module.requires_grad_(False)
        self.training = self.detector.training
        for part in (self.refiner_model, self.laterals):
            if part is not None:
                part.train(self.training)
        self._rest()

    @property
    def uses_features(self) -> bool:
        """Whether the refiner reads the detector's features rather than the image."""
        return self.refiner_model.config.feature_source != IMAGE_ENCODER

    @property
    def side(self) -> int:
        """Side of a RoI at the finest quadtree level."""
        return ROOT_SIDE << max(self.refiner_model.config.depth - 1, 0)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the detector as the host does."""

    @abstractmethod
    def training_losses(self, samples: Sequence[PhotoSample]) -> dict[str, Tensor]:
        """Losses of a training step on photos, brought into the form that the host takes.

        Args:
            samples: On the detector's device; labels count from 0.

        Returns:
            Scalars, weighted; those whose name begins with ``loss`` are to be summed.
        """

    def train(self, mode: bool = True) -> RefinedDetector:
        """Set the mode; what is frozen keeps its running statistics and drops nothing out."""
        super().train(mode)
        self._rest()
        return self

    def _rest(self) -> None:
        for frozen in self._frozen:
            for module in frozen.modules():
                if isinstance(module, (_NormBase, _DropoutNd)):
                    module.eval()

    @torch.no_grad()
    def refine(self, predictions: Sequence[Prediction], images: Sequence[Tensor] | None = None) -> list[Instances]:
        """Refine what the detector found.

        Args:
            predictions: Of B images.
            images: ``(3, H, W)`` RGB, uint8 or float32 in [0, 1], in the original size of each image; needed by a
                refiner with an image encoder.

        Returns:
            Instances of each image in the order of the prediction, on the detector's device. ``masks`` are the host's
            own, bool or float, but where a node of the quadtree has changed the probability. Labels, which are those
            of bool masks, are those that the same refiner's ``refine`` gives; of float masks, probabilities on the
            wrong side of the threshold are put a little beyond it.

        Raises:
            InvalidInputError: If the refiner needs images or features and there are none.
        """
        pipeline = Pipeline(self.refiner_model, self.joint.refine)
        jobs = []
        for index, prediction in enumerate(predictions):
            coarse = prediction.instances
            image, features = None, None
            if self.uses_features:
                features = prediction.features
                if features is None:
                    raise InvalidInputError(
                        f"expected features of {self.adapter.source!r}, got a prediction without: refine it with a "
                        "refiner that has an image encoder"
                    )
            elif images is None:
                raise InvalidInputError("expected images for a refiner with an image encoder, got none")
            else:
                image = images[index]
            given = CoarseMasks(coarse.masks, "image")
            job = pipeline.job(image, features, coarse.boxes, given, coarse.image_size)
            if prediction.box_probs is not None:  # which refinement starts from, and pastes into the host's own masks
                job.coarse = CoarseMasks(prediction.box_probs.to(pipeline.device), "box")
            jobs.append(job)
        pipeline.run(jobs)
        return [self._refined(prediction, job) for prediction, job in zip(predictions, jobs, strict=True)]

    def _refined(self, prediction: Prediction, job: Job) -> Instances:
        """Bring the refined masks of a job into the host's form, bool or float."""
        coarse, threshold = prediction.instances, self.joint.refine.mask_threshold
        device = coarse.masks.device
        probs, rois, masks = job.probs.to(device), job.rois.to(device), job.masks.to(device)
        is_bool = coarse.masks.dtype == torch.bool
        before = None
        if prediction.box_probs is not None:
            before = crop_box_masks(prediction.box_probs.float(), coarse.boxes, rois, probs.shape[-1])
            # Hosts paste otherwise than the pipeline: what refinement has left as it was stays as they pasted it.
            changed = torch.zeros_like(masks)
            paste(torch.ones_like(probs), rois, changed, threshold, probs != before)
            masks = torch.where(changed, masks, coarse.masks >= threshold)
        elif not is_bool:
            before = crop_masks(coarse.masks, rois, probs.shape[-1])
        if not is_bool:
            masks = self._as_probs(coarse.masks, masks, probs, rois, probs != before)
        return Instances(
            boxes=coarse.boxes,
            masks=masks,
            image_size=coarse.image_size,
            scores=coarse.scores,
            labels=coarse.labels,
            probs=probs,
            rois=rois,
            kept_coarse=job.kept_coarse.to(device),
            predicted_gain=None if job.gain is None else job.gain.to(device),
        )

    def _as_probs(self, coarse: Tensor, labels: Tensor, probs: Tensor, rois: Tensor, where: Tensor) -> Tensor:
        """Write the changed cells of refined probabilities into the host's own, which agree with the labels after it.

        Args:
            coarse: ``(N, H, W)`` float32, the host's.
            labels: ``(N, H, W)`` bool, the refined masks.
            probs: ``(N, S, S)`` float32 refined probabilities, RoI frame.
            rois: ``(N, 4)`` float32 xyxy, image pixels.
            where: ``(N, S, S)`` bool, the cells that changed.

        Returns:
            ``(N, H, W)`` float32.
        """
        threshold = self.joint.refine.mask_threshold
        masks = coarse.clone(memory_format=torch.contiguous_format)
        paste(probs, rois, masks, threshold, where)
        # Cells are coarser than pixels: what aligns outlines with the photo, or leaves a pixel alone, is not in them.
        masks = torch.where((masks >= threshold) == labels, masks, coarse)
        inside = masks.clamp(min=threshold + LABEL_MARGIN * (1 - threshold))
        outside = masks.clamp(max=threshold - LABEL_MARGIN * threshold)
        return torch.where((masks >= threshold) == labels, masks, torch.where(labels, inside, outside))

    def check_trainable(self) -> None:
        """Refuse joint training of a refiner that does not read the detector's features; before its losses are made.

        Raises:
            InvalidInputError: If the refiner has an image encoder.
        """
        if not self.uses_features:
            raise InvalidInputError(
                "expected a refiner on the detector's features for joint training, got one with an image encoder: make "
                "one with Refiner(RefinerModel(adapter.config()))"
            )

    def sample(self, image: Tensor) -> Tensor:
        """Choose at random which of the host's RoIs the refinement losses see.

        Args:
            image: ``(R,)`` int64, image of each RoI.

        Returns:
            Indices, int64, ascending: at most ``max_rois`` of each image.
        """
        score = torch.rand(image.shape, device=image.device)
        return (rank_in_roi(image, score) < self.joint.max_rois).nonzero()[:, 0]

    def rois(self, boxes: Tensor) -> Tensor:
        """RoIs of boxes, as in inference: with the refiner's margin.

        Args:
            boxes: ``(R, 4)`` float xyxy, image pixels.

        Returns:
            ``(R, 4)`` float32 xyxy, image pixels, without gradient.
        """
        return expand_boxes(boxes.detach().float(), self.refiner_model.config.box_margin)

    def refinement_losses(
        self, pyramid: FeaturePyramid, rois: Tensor, image: Tensor, coarse: Tensor, truth: Tensor
    ) -> dict[str, Tensor]:
        """The refinement losses of a training step, weighted (Eq. 2); they may be without a RoI.

        Args:
            pyramid: Features of B images, with their gradient.
            rois: ``(R, 4)`` float32 xyxy, image pixels: :meth:`rois`.
            image: ``(R,)`` int64, image of each.
            coarse: ``(R, S, S)`` float32 coarse probabilities, RoI frame, S being :attr:`side`.
            truth: ``(R, 2S, 2S)`` bool, RoI frame: :func:`crop_truth`.

        Returns:
            ``loss_refine``, ``loss_incoherence``, and ``loss_cross_entropy`` if the loss config has it.

        Raises:
            InvalidInputError: If the refiner does not read the detector's features.
        """
        self.check_trainable()
        transfiner = self.refiner_model.transfiner
        weight = next(transfiner.parameters())
        pyramid = pyramid.to(weight.device, weight.dtype)
        rois, image, coarse, truth = (value.to(weight.device) for value in (rois, image, coarse, truth))
        roi_pyramid = transfiner.roi_pyramid(pyramid, pyramid.to_network(rois, image), image)
        if self.joint.detach_coarse:
            coarse = coarse.detach()
        ones = torch.ones(rois.shape[0], device=rois.device)
        results = refinement_losses(transfiner, roi_pyramid, coarse, truth, ones, self.joint.loss)
        losses = {name: value for name, value in results.items() if name.startswith("loss")}
        # Every weight takes part in every step, as processes that average their gradients expect of each other.
        weights = self.refiner_model.parameters()
        nothing = sum((parameter.sum() for parameter in weights), start=torch.zeros((), device=rois.device))
        losses["loss_refine"] = losses["loss_refine"] + 0 * nothing
        return losses

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the refiner and all that belongs to it, for ``adapter.with_refiner(directory)``.

        Args:
            directory: Created if needed; older files of a model are replaced. ``Refiner.from_pretrained`` loads the
                refiner alone from it.

        Returns:
            The directory.
        """
        adapter, config = self.adapter, self.refiner_model.config
        parts: dict[str, nn.Module] = {}
        if self.laterals is not None:
            parts[LATERALS] = self.laterals
        if self.joint.train != "refiner" or adapter.recipe is not None:
            parts[DETECTOR] = self.detector
        fingerprint = adapter.fingerprint
        host = sys.modules.get(adapter.name)
        record: dict[str, Any] = {
            "adapter": adapter.name,
            "feature_source": config.feature_source,
            "channels": config.feature_channels,
            "strides": list(config.strides),
            "fingerprint": fingerprint,
            "versions": {
                "transfiner_refine": transfiner_refine.__version__,
                "torch": torch.__version__,
                adapter.name: getattr(host, "__version__", None),
            },
        }
        if adapter.categories is not None:
            record["categories"] = list(adapter.categories)
        if adapter.recipe is not None:
            record["detector"] = adapter.recipe
        return save_parts(Path(directory), self.refiner_model, record, parts, fingerprint)


def crop_truth(masks: Sequence[Tensor], matched: Tensor, rois: Tensor, image: Tensor, side: int) -> Tensor:
    """Cut the true mask of each RoI out of its image.

    Args:
        masks: ``(M, H, W)`` bool or integer 0 and 1, for each of B images; in the pixels in which ``rois`` are.
        matched: ``(R,)`` int64, which of its image's masks belongs to a RoI.
        rois: ``(R, 4)`` float32 xyxy.
        image: ``(R,)`` int64, ascending.
        side: Side of the result, twice the finest level's.

    Returns:
        ``(R, side, side)`` bool, RoI frame.
    """
    cropped = [rois.new_zeros((0, side, side))]
    for index, of_image in enumerate(masks):
        here = image == index
        cropped.append(crop_masks(of_image[matched[here]], rois[here], side))
    return torch.cat(cropped) >= 0.5
