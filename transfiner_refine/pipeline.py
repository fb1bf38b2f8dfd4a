"""How the instances of one or more images go through the model, in groups that fit a token budget.

N instances of an image, n of a group, S RoI side. Everything here is validated tensors on one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.config import ROOT_SIDE, RefineOptions
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.boxes import crop_windows, expand_boxes, touches_image
from transfiner_refine.functional.crops import crop_image
from transfiner_refine.functional.paste import crop_box_masks, crop_masks, paste
from transfiner_refine.functional.sampling import FeatureTable, RoIPyramid
from transfiner_refine.inputs import CoarseMasks
from transfiner_refine.modeling.gain import edge_statistics, refinement_statistics
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.pixel_head import PIXEL_SIDE, align, enlarge
from transfiner_refine.modeling.transfiner import TransfinerOutput, above_threshold
from transfiner_refine.types import FeaturePyramid, LevelNodes, RefineDetails

CROP_SIDE = 256
"""Side of the window in which one instance is encoded."""

CROP_SPAN = 216
"""Pixels of that window that the long side of the RoI takes."""

MAX_IMAGE_SIDE = 2048
"""Longest side at which a whole image is encoded."""

MAX_ENLARGEMENT = 2.0
"""Most that a whole image is enlarged for the sake of small instances."""

TOKENS_PER_INSTANCE = 1024
"""Typical sequence of an instance; the instances of a group are the token budget over this."""

BASE_BYTES, TOKEN_BYTES = 64_000_000, 36_000
"""Bounds of the memory of a call with the embedded model in float32: at rest, and per token of the budget."""


def working_memory(token_budget: int) -> int:
    """Bytes that a call holds at most beyond its inputs and outputs, with the embedded model in float32.

    ``benchmarks/scaling.py`` prints it beside what was measured. Not in it: an image that is encoded as a whole adds
    about 0.5 kB per pixel, and a single instance with more tokens than the budget its own.

    Args:
        token_budget: :attr:`RefineOptions.token_budget <transfiner_refine.RefineOptions>`.
    """
    return BASE_BYTES + token_budget * TOKEN_BYTES


@dataclass
class Job:
    """One image with its instances, and the results as they grow.

    Attributes:
        image: ``(3, H, W)`` float32 in [0, 1], or None where the features are given.
        pyramid: Features of the whole image; None while they are not made, or where instances are encoded as crops.
        boxes: ``(N, 4)`` float32 xyxy, image pixels.
        rois: ``(N, 4)`` float32 xyxy, image pixels: the boxes with their margin.
        coarse: The coarse masks as they were given.
        masks: ``(N, H, W)`` bool, the coarse masks until the refined ones are pasted.
        probs: ``(N, S, S)`` float32, refined probabilities in the RoI frame.
        kept_coarse: ``(N,)`` bool, where the refined mask strayed too far or promised too little.
        gain: ``(N,)`` float32, predicted gains of Boundary IoU, or None if the model does not predict them.
        index: ``(n,)`` int64, the instances that can be refined.
        table: The pyramid's features, flattened with its first group.
        found: Instances and output of each group, if quadtrees are asked for.
    """

    image: Tensor | None
    pyramid: FeaturePyramid | None
    boxes: Tensor
    rois: Tensor
    coarse: CoarseMasks
    masks: Tensor
    probs: Tensor
    kept_coarse: Tensor
    gain: Tensor | None
    index: Tensor
    table: FeatureTable | None = None
    found: list[tuple[Tensor, TransfinerOutput]] = field(default_factory=list)

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)``."""
        return self.masks.shape[1], self.masks.shape[2]


Group = list[tuple[Job, Tensor]]
"""Instances that go through the model together: jobs, and which of their instances."""


class Pipeline:
    """One call's way through a model.

    Args:
        model: The model.
        options: The call's choices.

    Raises:
        InvalidInputError: If more levels are asked for than the model has.
    """

    def __init__(self, model: RefinerModel, options: RefineOptions):
        self.model = model
        self.options = options
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.depth = model.config.depth if options.depth is None else options.depth
        if self.depth > model.config.depth:
            raise InvalidInputError(
                f"expected a depth of at most {model.config.depth}, the model's, got {self.depth}: "
                "lower RefineOptions.depth or load a deeper model"
            )

    def job(
        self,
        image: Tensor | None,
        pyramid: FeaturePyramid | None,
        boxes: Tensor,
        coarse: CoarseMasks,
        size: tuple[int, int],
    ) -> Job:
        """Prepare one image.

        Args:
            image: ``(3, H, W)`` uint8, or float in [0, 1]; None with a pyramid.
            pyramid: Features of this one image; None to encode the image.
            boxes: ``(N, 4)`` float32 xyxy, image pixels.
            coarse: N coarse masks.
            size: ``(H, W)``.

        Raises:
            InvalidInputError: If there is only an image, and the model has no image encoder.
        """
        if pyramid is None and self.model.image_encoder is None:
            raise InvalidInputError(
                f"expected features of {self.model.config.feature_source!r}, got an image: this refiner has no image "
                "encoder; pass features=, or load one that has"
            )
        boxes = boxes.to(self.device)
        coarse = replace(coarse, data=coarse.data.to(self.device))
        threshold = self.options.mask_threshold
        if coarse.frame == "box":
            masks = torch.zeros((boxes.shape[0], *size), dtype=torch.bool, device=self.device)
            paste(coarse.data.float(), boxes, masks, threshold)
        else:
            masks = coarse.data.clone() if coarse.data.dtype == torch.bool else coarse.data >= threshold
        if image is not None:
            image = image.to(self.device)
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        side = ROOT_SIDE << max(self.depth - 1, 0)
        predicts_gain = self.model.gain_predictor is not None and self.depth > 0
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return Job(
            image=image,
            pyramid=pyramid,
            boxes=boxes,
            rois=expand_boxes(boxes, self.model.config.box_margin),
            coarse=coarse,
            masks=masks,
            probs=torch.zeros((boxes.shape[0], side, side), device=self.device),
            kept_coarse=torch.zeros(boxes.shape[0], dtype=torch.bool, device=self.device),
            gain=torch.zeros(boxes.shape[0], device=self.device) if predicts_gain else None,
            index=(has_area & touches_image(boxes, size)).nonzero()[:, 0],
        )

    @torch.no_grad()
    def run(self, jobs: Sequence[Job]) -> None:
        """Refine all jobs: their masks, probabilities and flags are written."""
        options = self.options
        select = above_threshold(options.incoherence_threshold, options.max_nodes)
        for group in self._groups(jobs):
            coarse = torch.cat([self._coarse(job, index) for job, index in group])
            output = self.model.transfiner(self._features(group), coarse, self.depth, select, options.token_budget)
            output, aligned, pixels = self._align(group, output, coarse)
            # A coarse mask without a single cell has nothing to refine.
            present = coarse.amax(dim=(1, 2)) >= options.mask_threshold
            stray = _iou(output.probs, coarse, options.mask_threshold) < options.keep_if_iou_below
            gain = self._gain(output, coarse, pixels, aligned)
            keep = present & (stray | (gain < options.keep_if_gain_below))
            touched = output.touched & (present & ~keep)[:, None, None]
            probs = torch.where(touched, output.probs, coarse)
            pasted, where, before = probs, touched, coarse
            if aligned is not None:
                scale = PIXEL_SIDE // coarse.shape[-1]
                where = touched.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
                before = enlarge(coarse[:, None])[:, 0]
                pasted = torch.where(where, aligned, before)
            start = 0
            for job, index in group:
                part = slice(start, start + index.shape[0])
                job.probs[index] = probs[part]
                job.kept_coarse[index] = keep[part]
                if job.gain is not None:
                    job.gain[index] = gain[part]
                masks = job.masks[index]
                was = before[part] if job.coarse.frame == "image" else None
                paste(pasted[part], job.rois[index], masks, options.mask_threshold, where[part], was)
                job.masks[index] = masks
                start = part.stop
            if options.return_quadtree:
                (job, index), *_ = group
                job.found.append((index, output))

    def _align(
        self, group: Group, output: TransfinerOutput, coarse: Tensor
    ) -> tuple[TransfinerOutput, Tensor | None, Tensor | None]:
        """Move the outlines of a group onto the edges of its photos.

        Returns:
            The refinement, probabilities of pixels ``(n, P, P)``, and the pixels ``(n, 3, P, P)``; None where nothing
            is aligned.
        """
        head = self.model.pixel_head
        if head is None or not self.options.align_pixels or self.depth == 0:
            return output, None, None
        crops = []
        for job, index in group:
            if job.image is None:  # features alone, and they come one job at a time
                return output, None, None
            crops.append(crop_image(job.image, job.rois[index], PIXEL_SIDE, samples=-1))
        pixels = torch.cat(crops)
        return *align(head, pixels, output, coarse), pixels

    def _gain(self, output: TransfinerOutput, coarse: Tensor, pixels: Tensor | None, aligned: Tensor | None) -> Tensor:
        """Predicted gains ``(R,)``; infinite where nothing predicts them, so that no refinement is refused."""
        if self.model.gain_predictor is None or self.depth == 0:
            return coarse.new_full((coarse.shape[0],), torch.inf)
        statistics = refinement_statistics(output, coarse, self.options.mask_threshold)
        if pixels is not None and aligned is not None:
            edges = edge_statistics(pixels, coarse, aligned, self.options.mask_threshold)
            statistics = torch.cat([statistics, edges], dim=1)
        return self.model.gain_predictor(statistics)

    def details(self, job: Job) -> RefineDetails:
        """Join the incoherence maps and quadtrees of a job's groups, renumbered to its instances."""
        count = job.boxes.shape[0]
        incoherence = torch.zeros((count, ROOT_SIDE, ROOT_SIDE), device=self.device)
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        quadtree = [LevelNodes(none, none, none, none, none.float(), ROOT_SIDE << level) for level in range(self.depth)]
        probs = [none.float() for _ in range(self.depth)]
        for index, output in job.found:
            incoherence[index] = torch.sigmoid(output.detection.root_logits)
            above = 0  # nodes that earlier groups have at the level above
            for level, nodes in enumerate(output.detection.quadtree):
                known = quadtree[level]
                added = replace(nodes, roi=index[nodes.roi], parent=nodes.parent + above)
                above = len(known)
                columns = ("roi", "row", "col", "parent", "logits")
                joined = {name: torch.cat([getattr(known, name), getattr(added, name)]) for name in columns}
                quadtree[level] = replace(known, **joined)
                probs[level] = torch.cat([probs[level], output.node_probs[level]])
        coarse = self._coarse(job, torch.arange(count, device=self.device))
        return RefineDetails(incoherence, tuple(quadtree), coarse, tuple(probs))

    def _groups(self, jobs: Sequence[Job]) -> Iterator[Group]:
        """Split the instances of all jobs into groups; instances of several images share a group only as crops."""
        size = max(1, self.options.token_budget // TOKENS_PER_INSTANCE)
        group: Group = []
        room = size
        for job in jobs:
            if job.index.shape[0] and self._encodes_whole(job):
                job.pyramid = self._encode_whole(job)
            alone = job.pyramid is not None or self.options.return_quadtree
            if group and alone:
                yield group
                group, room = [], size
            for index in _split(job.index, room, size):
                group.append((job, index))
                room -= index.shape[0]
                if room == 0 or alone:
                    yield group
                    group, room = [], size
            job.pyramid = job.table = None  # its instances are done; a batch holds the features of one image at a time
        if group:
            yield group

    def _encodes_whole(self, job: Job) -> bool:
        """Whether the image is encoded as a whole rather than instance by instance."""
        if job.pyramid is not None or self.options.encode == "crops":
            return False
        if self.options.encode == "image":
            return True
        height, width = job.image_size
        return job.index.shape[0] * CROP_SIDE**2 > height * width * self._scale(job) ** 2

    def _scale(self, job: Job) -> float:
        """Scale at which the image is encoded as a whole: its median RoI is as large as in a crop, within bounds."""
        rois = job.rois[job.index]
        median = float((rois[:, 2:] - rois[:, :2]).amax(dim=1).median())
        return min(CROP_SPAN / median, MAX_IMAGE_SIDE / max(job.image_size), MAX_ENLARGEMENT)

    def _encode_whole(self, job: Job) -> FeaturePyramid:
        assert job.image is not None
        height, width = job.image_size
        scale = self._scale(job)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = F.interpolate(job.image[None], size=(rows, columns), mode="bilinear", antialias=scale < 1)
        ratio = torch.tensor([[columns / width, rows / height]], device=self.device)
        return replace(self._encode(pixels), scale=ratio)

    def _encode(self, pixels: Tensor) -> FeaturePyramid:
        assert self.model.image_encoder is not None
        return self.model.image_encoder(pixels.to(self.dtype).contiguous(memory_format=torch.channels_last))

    def _features(self, group: Group) -> RoIPyramid:
        """Features of a group's RoIs: from the whole image they share, or from a crop of each."""
        rois = torch.cat([job.rois[index] for job, index in group])
        (job, index), *_ = group
        if job.pyramid is not None:
            if job.table is None:
                job.pyramid = job.pyramid.to(self.device, self.dtype)
                job.table = FeatureTable.of(job.pyramid)
            image = torch.zeros_like(index)
            return self.model.transfiner.roi_pyramid(job.table, job.pyramid.to_network(rois, image), image)
        windows = crop_windows(rois, CROP_SPAN, CROP_SIDE)
        crops, start = [], 0
        for job, index in group:
            assert job.image is not None
            crops.append(crop_image(job.image, windows[start : start + index.shape[0]], CROP_SIDE))
            start += index.shape[0]
        scale = CROP_SIDE / (windows[:, 2:] - windows[:, :2])
        pyramid = replace(self._encode(torch.cat(crops)), scale=scale, origin=windows[:, :2])
        image = torch.arange(rois.shape[0], device=rois.device)
        return self.model.transfiner.roi_pyramid(pyramid, pyramid.to_network(rois, image), image)

    def _coarse(self, job: Job, index: Tensor) -> Tensor:
        """Coarse probabilities ``(n, S, S)`` of some instances in their RoIs."""
        data, side = job.coarse.data[index], job.probs.shape[-1]
        if job.coarse.frame == "box":
            return crop_box_masks(data.float(), job.boxes[index], job.rois[index], side)
        return crop_masks(data, job.rois[index], side)


def _split(index: Tensor, first: int, size: int) -> Iterator[Tensor]:
    """Cut ``index`` into pieces: one of at most ``first``, then of at most ``size``."""
    start = 0
    while start < index.shape[0]:
        stop = start + (first if start == 0 else size)
        yield index[start:stop]
        start = stop


def _iou(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """IoU of thresholded maps ``(R, S, S)``: ``(R,)``, one where both are empty."""
    a, b = a >= threshold, b >= threshold
    union = (a | b).sum(dim=(1, 2))
    return torch.where(union > 0, (a & b).sum(dim=(1, 2)) / union.clamp(min=1), 1.0)
