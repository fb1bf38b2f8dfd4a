"""How the instances of one or more images go through the model, in groups that fit a token budget.

N instances of an image, n of a group, S RoI side. Everything here is validated tensors on one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.config import ROOT_SIDE, RefineOptions
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.boxes import crop_windows, expand_boxes, touches_image, within_reach
from transfiner_refine.functional.crops import OUTSIDE, ImageHalves, crop_image
from transfiner_refine.functional.paste import crop_box_masks, crop_masks, paste
from transfiner_refine.functional.quadtree import take_nodes
from transfiner_refine.functional.sampling import FeatureTable, RoIPyramid
from transfiner_refine.inputs import CoarseMasks, boxes_from_masks
from transfiner_refine.modeling.gain import edge_statistics, refinement_statistics
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.pixel_head import PIXEL_SIDE, align, enlarge
from transfiner_refine.modeling.transfiner import TransfinerOutput, above_threshold
from transfiner_refine.proposals import propose
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

CPU_GROUP = 6
"""Most instances of a group on a CPU, whose caches and allocator are slower with larger tensors."""

BASE_BYTES, TOKEN_BYTES = 64_000_000, 36_000
"""Bounds of the memory of a call with the embedded model in float32: at rest, and per token of the budget."""


def working_memory(token_budget: int) -> int:
    """Bytes that a call holds at most beyond its inputs and outputs, with the embedded model in float32.

    ``benchmarks/scaling.py`` prints it beside what was measured. Not in it: the copies of an image in float32, which
    count from some megapixels on, 0.5 kB per pixel of one that is encoded as a whole, and what a single instance with
    more tokens than the budget has of its own. Before the first pass the segmenter holds up to 400 MB, whatever the
    budget.

    Args:
        token_budget: :attr:`RefineOptions.token_budget <transfiner_refine.RefineOptions>`.
    """
    return BASE_BYTES + token_budget * TOKEN_BYTES


class Found(NamedTuple):
    """What one pass made of a group of n instances of one image.

    Attributes:
        index: ``(n,)`` int64, the instances.
        accepted: ``(n,)`` bool, where it is the pass that the result is from, or the first.
        coarse: ``(n, S, S)`` float32, what it started from.
        output: The refinement.
    """

    index: Tensor
    accepted: Tensor
    coarse: Tensor
    output: TransfinerOutput


@dataclass
class Job:
    """One image with its instances, and the results as they grow.

    Attributes:
        image: The image with its halves; None where the features are given.
        features: The features that were given, or None.
        boxes: ``(N, 4)`` float32 xyxy, image pixels.
        spans: ``(N, 4)`` float32 xyxy, image pixels: the boxes within reach of the image, grown to hold the masks that
            earlier passes made.
        rois: ``(N, 4)`` float32 xyxy, image pixels: spans with their margin, where ``probs`` lies.
        given: The coarse masks of the call.
        coarse: The masks that this pass starts from: as they were given, or those of the pass before.
        proposed: ``(N,)`` bool, where the first pass starts from what the segmenter wrote into ``masks`` instead.
        proposals: ``(N, 2)`` float32, what it says of its proposals; None where it was not asked.
        masks: ``(N, H, W)`` bool, the coarse masks until the segmenter's and the refined ones are pasted.
        probs: ``(N, S, S)`` float32, refined probabilities in the RoI frame.
        kept_coarse: ``(N,)`` bool, where the refined mask strayed too far or promised too little.
        settled: ``(N,)`` bool, where the last pass changed next to nothing.
        gain: ``(N,)`` float32, predicted gains of Boundary IoU, or None if the model does not predict them.
        index: ``(n,)`` int64, the instances that this pass refines.
        pyramid: Features of the whole image; None while they are not made, or where instances are encoded as crops.
        table: The pyramid's features, flattened with its first group.
        found: What each group came to, if quadtrees are asked for.
    """

    image: ImageHalves | None
    features: FeaturePyramid | None
    boxes: Tensor
    spans: Tensor
    rois: Tensor
    given: CoarseMasks
    coarse: CoarseMasks
    masks: Tensor
    probs: Tensor
    kept_coarse: Tensor
    settled: Tensor
    gain: Tensor | None
    index: Tensor
    proposed: Tensor
    proposals: Tensor | None = None
    pyramid: FeaturePyramid | None = None
    table: FeatureTable | None = None
    found: list[Found] = field(default_factory=list)

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)``."""
        return self.masks.shape[1], self.masks.shape[2]

    def start_again(self) -> None:
        """Take the refined masks for the coarse ones of another pass.

        What was refused, has settled or is empty is left out.
        """
        index = self.index[~(self.kept_coarse | self.settled)[self.index]]
        some = self.masks[index].flatten(1).any(dim=1)
        self.index = index[some]
        self.grow(self.index)
        self.coarse = CoarseMasks(self.masks, "image")
        self.proposed = torch.zeros_like(self.proposed)

    def withdraw_proposals(self) -> None:
        """Have what was refused behind a proposal start once more from the masks of the call, and nothing else."""
        refused = (self.proposed & self.kept_coarse).nonzero()[:, 0]
        self.spans[refused] = within_reach(self.boxes[refused], self.image_size)
        self.proposed[refused] = False
        self.index = refused

    def grow(self, index: Tensor) -> None:
        """Grow the spans of some instances to hold their masks, none of which is empty."""
        held, spans = boxes_from_masks(self.masks[index]), self.spans[index]
        self.spans[index] = torch.cat(
            [torch.minimum(spans[:, :2], held[:, :2]), torch.maximum(spans[:, 2:], held[:, 2:])], dim=1
        )

    def restore(self, index: Tensor, threshold: float) -> None:
        """Give some instances the masks of the call back."""
        given = self.given.data[index]
        if self.given.frame == "box":
            self.masks[index] = False
            paste(given.float(), self.boxes[index], self.masks, threshold, index=index)
        else:
            self.masks[index] = given if given.dtype == torch.bool else given >= threshold


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
        if not isinstance(options, RefineOptions):
            raise InvalidInputError(f"expected options as RefineOptions, got {type(options).__name__}")
        self.model = model
        self.options = options
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.passes = model.config.passes if options.passes is None else options.passes
        self.box_margin = model.config.box_margin if options.box_margin is None else options.box_margin
        self.depth = model.config.depth if options.depth in (None, "auto") else options.depth
        if self.depth > model.config.depth:
            raise InvalidInputError(
                f"expected a depth of at most {model.config.depth}, the model's, got {self.depth}: "
                "lower RefineOptions.depth or load a deeper model"
            )
        self._sees_proposals = model.segmenter is not None and options.proposes and self.depth > 0

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
            is_bool = coarse.data.dtype == torch.bool
            # Pasting writes to rows of pixels, whatever the strides of what was given.
            masks = coarse.data.clone(memory_format=torch.contiguous_format) if is_bool else coarse.data >= threshold
            masks = masks.contiguous()
        side = ROOT_SIDE << max(self.depth - 1, 0)
        predicts_gain = self.model.gain_predictor is not None and self.depth > 0
        spans = within_reach(boxes, size)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        has_pixels = masks.flatten(1).view(torch.uint8).amax(dim=1) > 0  # several times faster than `any` on a CPU
        return Job(
            image=None if image is None else ImageHalves(image.to(self.device)),
            features=pyramid,
            boxes=boxes,
            spans=spans,
            rois=expand_boxes(spans, self.box_margin),
            given=coarse,
            coarse=coarse,
            masks=masks,
            probs=torch.zeros((boxes.shape[0], side, side), dtype=torch.float32, device=self.device),
            kept_coarse=torch.zeros(boxes.shape[0], dtype=torch.bool, device=self.device),
            settled=torch.zeros(boxes.shape[0], dtype=torch.bool, device=self.device),
            gain=torch.zeros(boxes.shape[0], dtype=torch.float32, device=self.device) if predicts_gain else None,
            index=(has_area & has_pixels & touches_image(boxes, size)).nonzero()[:, 0],
            proposed=torch.zeros(boxes.shape[0], dtype=torch.bool, device=self.device),
        )

    @torch.no_grad()
    def run(self, jobs: Sequence[Job]) -> None:
        """Refine all jobs: their masks, probabilities and flags are written."""
        for job in jobs:
            self._propose(job)
            if job.image is not None and len(jobs) > 1:
                job.image.forget()
        self._pass(jobs, 0)
        if self._sees_proposals:  # what is refused behind one may win without it
            everything = [job.index for job in jobs]
            for job in jobs:
                job.withdraw_proposals()
            self._pass(jobs, 0, again=True)
            for job, index in zip(jobs, everything, strict=True):
                job.index = index
        for number in range(1, self.passes):
            for job in jobs:
                job.start_again()
            self._pass(jobs, number)

    def _propose(self, job: Job) -> None:
        """Let the segmenter replace coarse masks, where there is one."""
        segmenter, options = self.model.segmenter, self.options
        if segmenter is None or not self._sees_proposals or job.image is None or job.index.shape[0] == 0:
            return
        job.proposals, job.proposed = propose(
            segmenter, job.image, job.spans, job.masks, job.index, options.encode, options.mask_threshold
        )
        job.grow(job.proposed.nonzero()[:, 0])

    def _pass(self, jobs: Sequence[Job], number: int, again: bool = False) -> None:
        """Refine what is left to refine in all jobs once; ``again`` if it was refused behind proposals before."""
        options = self.options
        # A batch holds the pixels of the images at work; those of a single one serve another pass.
        for group in _forgetting(self._groups(jobs)) if len(jobs) > 1 else self._groups(jobs):
            boxes = torch.cat([job.spans[index] for job, index in group])
            rois = expand_boxes(boxes, self.box_margin)
            depth = depth_of(boxes) if options.depth == "auto" else None
            select = above_threshold(options.incoherence_threshold, options.max_nodes, depth)
            parts = list(zip(group, rois.split([len(index) for _, index in group]), strict=True))
            coarse = given = torch.cat([self._start(job, index, part) for (job, index), part in parts])
            has_moved = number > 0 or any(bool(job.proposed[index].any()) for job, index in group)
            if has_moved:
                given = torch.cat([self._coarse(job, job.given, index, part) for (job, index), part in parts])
            output = self.model.transfiner(
                self._features(group, rois), coarse, self.depth, select, options.token_budget
            )
            output, aligned, pixels = self._align(parts, output, coarse)
            # A coarse mask without a single cell has nothing to refine.
            present = coarse.amax(dim=(1, 2)) >= options.mask_threshold
            agreement = _iou(output.probs, coarse, options.mask_threshold)
            refused = agreement < options.keep_if_iou_below
            if has_moved:  # steps that are each small enough may lead far away
                refused |= _iou(output.probs, given, options.mask_threshold) < options.keep_if_iou_below
            gain = None
            if number == 0:  # what is predicted is what all passes win
                gain = self._gain(group, output, given, pixels, aligned, again)
                refused |= gain < options.keep_if_gain_below
            keep = present & refused
            touched = output.touched & (present & ~keep)[:, None, None]
            probs = torch.where(touched, output.probs, coarse)
            if number == 0 and has_moved:
                probs = torch.where(keep[:, None, None], given, probs)
            pasted, where, before = probs, touched, coarse
            if aligned is not None:
                scale = PIXEL_SIDE // coarse.shape[-1]
                where = touched.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
                before = enlarge(coarse[:, None])[:, 0]
                pasted = torch.where(where, aligned, before)
            start = 0
            for (job, index), roi in parts:
                part = slice(start, start + index.shape[0])
                start = part.stop
                # A proposal has no detail of pixels that cells would average away.
                in_pixels = ~job.proposed[index] & (job.coarse.frame == "image")
                for rows, was in ((in_pixels, before[part][in_pixels]), (~in_pixels, None)):
                    new, cells = pasted[part][rows], where[part][rows]
                    paste(new, roi[rows], job.masks, options.mask_threshold, cells, was, index[rows])
                if number == 0:
                    job.restore(index[keep[part] & job.proposed[index]], options.mask_threshold)
                    job.kept_coarse[index] = keep[part]
                    if job.gain is not None and gain is not None:
                        job.gain[index] = gain[part]
                job.settled[index] = (agreement[part] >= options.again_if_iou_below) | keep[part]
                # What a later pass refuses stays as the one before left it.
                new = (~keep[part] | (number == 0)).nonzero()[:, 0]
                job.rois[index[new]], job.probs[index[new]] = roi[new], probs[part][new]
            if options.return_quadtree:
                ((job, index), _), *_ = parts
                job.found.append(Found(index, ~keep | (number == 0), coarse, output))

    def _align(
        self, parts: Sequence[tuple[tuple[Job, Tensor], Tensor]], output: TransfinerOutput, coarse: Tensor
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
        for (job, _), rois in parts:
            if job.image is None:  # features alone, and they come one job at a time
                return output, None, None
            crops.append(crop_image(job.image, rois, PIXEL_SIDE, samples=-1))
        pixels = torch.cat(crops)
        return *align(head, pixels, output, coarse), pixels

    def _gain(
        self,
        group: Group,
        output: TransfinerOutput,
        coarse: Tensor,
        pixels: Tensor | None,
        aligned: Tensor | None,
        again: bool,
    ) -> Tensor:
        """Predicted gains ``(R,)``; infinite where nothing predicts them, so that no refinement is refused."""
        if self.model.gain_predictor is None or self.depth == 0:
            return coarse.new_full((coarse.shape[0],), torch.inf)
        # Gains of some thousandths decide: a caller's autocast must not round them.
        with torch.autocast(self.device.type, enabled=False):
            statistics = refinement_statistics(output, coarse, self.options.mask_threshold)
            if pixels is not None and aligned is not None:
                edges = edge_statistics(pixels, coarse, aligned, self.options.mask_threshold)
                proposals = [job.proposals[index] for job, index in group if job.proposals is not None]
                statistics = torch.cat([statistics, edges, *([torch.cat(proposals)] if proposals else [])], dim=1)
            return self.model.gain_predictor(statistics, again)

    def details(self, job: Job) -> RefineDetails:
        """Join the incoherence maps and quadtrees of a job's groups, renumbered to its instances.

        Those of an instance are of its last pass.
        """
        count, side = job.boxes.shape[0], job.probs.shape[-1]
        incoherence = torch.zeros((count, ROOT_SIDE, ROOT_SIDE), dtype=torch.float32, device=self.device)
        coarse_probs = torch.zeros((count, side, side), dtype=torch.float32, device=self.device)
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        quadtree = [LevelNodes(none, none, none, none, none.float(), ROOT_SIDE << level) for level in range(self.depth)]
        probs = [none.float() for _ in range(self.depth)]
        last = torch.full((count,), -1, device=self.device)
        for number, found in enumerate(job.found):
            last[found.index[found.accepted]] = number
        for number, found in enumerate(job.found):
            mine = last[found.index] == number
            index = found.index[mine]
            incoherence[index] = torch.sigmoid(found.output.detection.root_logits[mine])
            coarse_probs[index] = found.coarse[mine]
            place = none  # of each node among those of the level above that are kept
            above = 0  # nodes that earlier groups have there
            for level, nodes in enumerate(found.output.detection.quadtree):
                keep = mine[nodes.roi].nonzero()[:, 0]
                kept, known = take_nodes(nodes, keep), quadtree[level]
                parent = kept.parent if level == 0 else place[kept.parent] + above
                added = replace(kept, roi=found.index[kept.roi], parent=parent)
                place, above = mine[nodes.roi].cumsum(0) - 1, len(known)
                columns = ("roi", "row", "col", "parent", "logits")
                joined = {name: torch.cat([getattr(known, name), getattr(added, name)]) for name in columns}
                quadtree[level] = replace(known, **joined)
                probs[level] = torch.cat([probs[level], found.output.node_probs[level][keep]])
        return RefineDetails(incoherence, tuple(quadtree), coarse_probs, tuple(probs))

    def _groups(self, jobs: Sequence[Job]) -> Iterator[Group]:
        """Split the instances of all jobs into groups; instances of several images share a group only as crops."""
        size = max(1, self.options.token_budget // TOKENS_PER_INSTANCE)
        if self.device.type == "cpu":
            size = min(size, CPU_GROUP)
        group: Group = []
        room = size
        for job in jobs:
            job.pyramid = job.features
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
        rows, columns = map(self._padded, self._whole_size(job))
        return job.index.shape[0] * CROP_SIDE**2 > rows * columns

    def _whole_size(self, job: Job) -> tuple[int, int]:
        """Rows and columns of an image that is encoded as a whole: its median RoI as large as in a crop, in bounds."""
        rois = expand_boxes(job.spans[job.index], self.box_margin)
        median = float((rois[:, 2:] - rois[:, :2]).amax(dim=1).median())
        scale = min(CROP_SPAN / median, MAX_IMAGE_SIDE / max(job.image_size), MAX_ENLARGEMENT)
        height, width = job.image_size
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _padded(self, side: int) -> int:
        """The side in whole units of the backbone."""
        assert self.model.image_encoder is not None
        unit = self.model.image_encoder.backbone.unit
        return -(-side // unit) * unit

    def _encode_whole(self, job: Job) -> FeaturePyramid:
        assert job.image is not None
        height, width = job.image_size
        rows, columns = self._whole_size(job)
        pixels = F.interpolate(job.image[0], size=(rows, columns), mode="bilinear", antialias=rows < height)
        beyond = 0, self._padded(columns) - columns, 0, self._padded(rows) - rows
        if any(beyond):  # zero, as outside of the image in a crop; padding by nothing would copy all pixels
            pixels = F.pad(pixels, beyond)
        pixels.add_(OUTSIDE)
        ratio = torch.tensor([[columns / width, rows / height]], dtype=torch.float32, device=self.device)
        return replace(self._encode(pixels), scale=ratio)

    def _encode(self, pixels: Tensor) -> FeaturePyramid:
        assert self.model.image_encoder is not None
        return self.model.image_encoder(pixels.to(self.dtype).contiguous(memory_format=torch.channels_last))

    def _features(self, group: Group, rois: Tensor) -> RoIPyramid:
        """Features of a group's RoIs: from the whole image they share, or from a crop of each."""
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

    def _start(self, job: Job, index: Tensor, rois: Tensor) -> Tensor:
        """Probabilities ``(n, S, S)`` that a pass of some instances starts from, in RoIs of theirs."""
        coarse, proposed = self._coarse(job, job.coarse, index, rois), job.proposed[index]
        if not bool(proposed.any()):
            return coarse
        threshold = self.options.mask_threshold
        cells = crop_masks(job.masks[index], rois, coarse.shape[-1])
        empty = proposed & (cells.amax(dim=(1, 2)) < threshold)  # so thin that it has no cell: it cannot be judged
        job.proposed[index[empty]] = False
        job.restore(index[empty], threshold)
        return torch.where((proposed & ~empty)[:, None, None], cells, coarse)

    def _coarse(self, job: Job, masks: CoarseMasks, index: Tensor, rois: Tensor) -> Tensor:
        """Probabilities ``(n, S, S)`` of some instances of a job's coarse masks in RoIs of theirs."""
        data, side = masks.data[index], job.probs.shape[-1]
        if masks.frame == "box":
            return crop_box_masks(data.float(), job.boxes[index], rois, side)
        return crop_masks(data, rois, side)


def depth_of(boxes: Tensor) -> Tensor:
    """Levels that objects of some size need: the last is the first whose cells are smaller than a pixel.

    Args:
        boxes: ``(N, 4)`` xyxy, image pixels.

    Returns:
        ``(N,)`` int64: 1 for boxes whose long side is up to 28 pixels, 2 up to 56, and so on.
    """
    long_side = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
    return (long_side / ROOT_SIDE).log2().ceil().clamp(min=0).long() + 1


def _forgetting(groups: Iterator[Group]) -> Iterator[Group]:
    """Pass groups on, and let go of an image's pixels in float32 behind the last group that it is in."""
    begun: list[Job] = []
    for group in groups:
        yield group
        begun += [job for job, _ in group]
        last = begun[-1]  # the next group may be of it, too
        _forget([job for job in begun if job is not last])
        begun = [last]
    _forget(begun)


def _forget(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.image is not None:
            job.image.forget()


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
