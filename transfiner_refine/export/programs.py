"""Writing a refiner down as graphs: the image encoder, and the refiner at a fixed node budget."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from transfiner_refine import proposals
from transfiner_refine.config import ROOT_SIDE, RefineOptions
from transfiner_refine.data.coco import check_output, write_atomic, write_json_atomic
from transfiner_refine.errors import InvalidInputError, MissingDependencyError
from transfiner_refine.export import runtime
from transfiner_refine.export.graphs import EncoderGraph, RefinerGraph, node_budget
from transfiner_refine.functional.crops import OUTSIDE
from transfiner_refine.functional.paste import LEAST_CHANGE
from transfiner_refine.modeling.pixel_head import PIXEL_SIDE
from transfiner_refine.modeling.segmenter import CANDIDATES, MASK_STRIDE
from transfiner_refine.pipeline import CROP_SIDE, CROP_SPAN
from transfiner_refine.refiner import Refiner

OPSET = 23
"""The first opset with an attention operator, which onnxruntime computes in two thirds of the time."""

FOLDED_BYTES = 1 << 22
"""Constants up to this size are computed at export; onnxruntime 1.32 gets a convolution with a padded kernel wrong."""

EXAMPLES = 3
"""RoIs of the inputs with which the graphs are traced; 0 and 1 would be taken for constants."""


@dataclass(frozen=True)
class RefinerPrograms:
    """The graphs of a refiner.

    Attributes:
        image_encoder: ``pixels (B, 3, 32·h, 32·w)`` float32 RGB in [0, 1] to a tuple of maps, finest first; None where
            a detector makes the features.
        refiner: ``((maps, ...), rois, image, coarse)``, and ``roi_pixels`` with a pixel head, to ``probs``, ``touched``
            and, where the model has them, ``aligned`` and ``gain``; see
            :class:`transfiner_refine.export.graphs.RefinerGraph`. Behind a segmenter it takes ``given`` and
            ``proposals``, too.
        config: What ``config.json`` says of them: inputs, frames, sizes, thresholds and node budget.
        segmenter: ``pixels (N, 3, 448, 448)`` float32 RGB in [0, 1] and ``boxes (N, 4)`` in them to ``logits
            (N, 3, 112, 112)`` and ``quality (N, 3)``; None without one.
    """

    image_encoder: ExportedProgram | None
    refiner: ExportedProgram
    config: dict[str, Any]
    segmenter: ExportedProgram | None = None

    def save(self, directory: str | Path) -> Path:
        """Write ``refiner.pt2``, ``image_encoder.pt2`` and ``config.json``; returns the folder.

        Each file is written whole or not at all.
        ``torch.export.load`` reads them, ``torch._inductor.aoti_compile_and_package`` compiles them.

        Raises:
            InvalidInputError: If the folder cannot be written to.
        """
        files = {}
        for name, program in self._programs().items():
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            files[f"{name}.pt2"] = buffer.getvalue()
        return _write(Path(directory), files, self.config)

    def to_onnx(self, directory: str | Path, opset: int = OPSET) -> Path:
        """Write ``refiner.onnx``, ``image_encoder.onnx``, ``config.json`` and ``onnx_refiner.py``; returns the folder.

        Args:
            directory: Created if needed; each file is written whole or not at all.
            opset: Version of ONNX's operators, 18 or more. From 23 on there is an attention operator, which
                onnxruntime computes faster; other runtimes may know only older ones.

        Raises:
            MissingDependencyError: If onnx or onnxscript is not installed.
            InvalidInputError: If the folder cannot be written to, or the opset is too old.
        """
        _check_onnx()
        if opset < 18:
            raise InvalidInputError(f"expected an opset of at least 18, got {opset}: leave it out for {OPSET}")
        files = {}
        for name, program in self._programs().items():
            description = self.config[name]
            inputs, outputs = ([x["name"] for x in description[kind]] for kind in ("inputs", "outputs"))
            files[f"{name}.onnx"] = _onnx_bytes(program, inputs, outputs, opset)
        # The runtime goes along: where it is used, there need be neither this package nor torch.
        files["onnx_refiner.py"] = Path(runtime.__file__).read_bytes()
        return _write(Path(directory), files, self.config | {"opset": opset})

    def _programs(self) -> dict[str, ExportedProgram]:
        programs = {"image_encoder": self.image_encoder, "segmenter": self.segmenter, "refiner": self.refiner}
        return {name: program for name, program in programs.items() if program is not None}


def export_program(
    refiner: Refiner, *, max_nodes: int | Sequence[int] | None = None, options: RefineOptions | None = None
) -> RefinerPrograms:
    """Trace a refiner with ``torch.export``.

    The programs are those of the CPU in float32, whatever the refiner's own device and dtype. The number of RoIs and of
    images is dynamic, and so are the sides of the maps.

    Args:
        refiner: The refiner.
        max_nodes: Nodes per RoI and level, one number (as ``RefineOptions.max_nodes``) or one for each level; None
            takes ``options.max_nodes``, or without that what real outlines need. Time and memory follow it.
        options: ``depth``, ``segment``, ``align_pixels`` and the thresholds, which become constants, ``passes`` and
            ``again_if_iou_below``; the depth ``"auto"`` is the model's own. The graph is of one pass: what runs it
            takes several.

    Returns:
        The programs.

    Raises:
        InvalidInputError: If the depth is 0 or exceeds the model's, or the node budget does not fit it.
    """
    options = options or RefineOptions()
    config = refiner.config
    depth = config.depth if options.depth in (None, "auto") else options.depth
    if not 1 <= depth <= config.depth:
        raise InvalidInputError(f"expected a depth of 1 to {config.depth}, the model's, to export, got {depth}")
    budget = node_budget(options.max_nodes if max_nodes is None else max_nodes, depth)
    model = copy.deepcopy(refiner.model).to(device="cpu", dtype=torch.float32).eval()
    dynamic = {0: Dim.DYNAMIC}
    encoder = None
    if model.image_encoder is not None:
        # At sides of whole cells of the coarsest map, the maps of an image do not depend on how odd sides are padded.
        coarsest = config.strides[-1]
        sides = {2: coarsest * Dim("rows", min=2, max=4096), 3: coarsest * Dim("columns", min=2, max=4096)}
        pixels = torch.zeros(EXAMPLES, 3, 2 * CROP_SIDE, CROP_SIDE)
        encoder = _trace(EncoderGraph(model.image_encoder), (pixels,), (dynamic | sides,))
    graph = RefinerGraph(
        model,
        budget,
        options.incoherence_threshold,
        options.mask_threshold,
        align_pixels=options.align_pixels,
        segment=options.proposes,
    )
    segmenter = None
    if graph.sees_proposals:
        pixels = torch.zeros(EXAMPLES, 3, proposals.CROP_SIDE, proposals.CROP_SIDE)
        boxes = torch.tensor([[100.0, 100.0, 300.0, 300.0]]).repeat(EXAMPLES, 1)
        assert model.segmenter is not None
        segmenter = _trace(model.segmenter, (pixels, boxes), (dynamic, dynamic))
    side = ROOT_SIDE << (depth - 1)
    maps = tuple(torch.zeros(2, config.feature_channels, 768 // s, 512 // s) for s in config.strides)
    rois = torch.tensor([[0.0, 0.0, 100.0, 100.0]]).repeat(EXAMPLES, 1)
    inputs = (maps, rois, torch.zeros(EXAMPLES, dtype=torch.long), torch.zeros(EXAMPLES, side, side))
    has_pixels = graph.pixel_head is not None
    inputs += (torch.zeros(EXAMPLES, 3, PIXEL_SIDE, PIXEL_SIDE) if has_pixels else None,)
    if graph.sees_proposals:
        inputs += (torch.zeros(EXAMPLES, side, side), torch.zeros(EXAMPLES, 2))
    of_map = dynamic | {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    shapes_of = [None if x is None else dynamic for x in inputs[1:]]
    program = _trace(graph, inputs, ((of_map,) * len(maps), *shapes_of))
    return RefinerPrograms(encoder, program, _describe(refiner, options, budget), segmenter)


def export_onnx(
    refiner: Refiner,
    directory: str | Path,
    *,
    max_nodes: int | Sequence[int] | None = None,
    options: RefineOptions | None = None,
    opset: int = OPSET,
) -> Path:
    """Write a refiner as ONNX: see :func:`export_program` and :meth:`RefinerPrograms.to_onnx`.

    Returns:
        The folder, which :class:`transfiner_refine.export.OnnxRefiner` opens.

    Raises:
        MissingDependencyError: If onnx or onnxscript is not installed.
        InvalidInputError: If depth, node budget, opset or folder cannot be used.
    """
    _check_onnx()
    check_output(Path(directory) / "config.json")
    return export_program(refiner, max_nodes=max_nodes, options=options).to_onnx(directory, opset)


def _trace(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes, strict=False)


def _onnx_bytes(program: ExportedProgram, inputs: list[str], outputs: list[str], opset: int) -> bytes:
    from onnxscript import optimizer

    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=inputs,
        output_names=outputs,
        optimize=False,
        verbose=False,
    )
    assert exported is not None
    # The other passes of the optimizer take minutes and win nothing: onnxruntime has its own.
    optimizer.fold_constants(exported.model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES)
    optimizer.remove_unused_nodes(exported.model)
    return exported.model_proto.SerializeToString()


def _check_onnx() -> None:
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise MissingDependencyError(
            f'{error.name} is not installed, which ONNX needs: pip install "transfiner-refine[onnx]"'
        ) from error
    del onnx, onnxscript


def _describe(refiner: Refiner, options: RefineOptions, budget: tuple[int, ...]) -> dict[str, Any]:
    """The content of ``config.json``."""
    config, side = refiner.config, ROOT_SIDE << (len(budget) - 1)
    has_encoder = refiner.model.image_encoder is not None
    maps = [
        _value(f"map_{stride}", ["B", config.feature_channels, f"H / {stride}", f"W / {stride}"], "float32")
        for stride in config.strides
    ]
    outputs = [
        _value("probs", ["N", side, side], "float32", "refined probabilities, RoI frame"),
        _value("touched", ["N", side, side], "bool", "cells that were refined; the others are as in coarse"),
    ]
    aligns = refiner.model.pixel_head is not None and options.align_pixels
    pixels = []
    if aligns:
        shape = ["N", 3, PIXEL_SIDE, PIXEL_SIDE]
        pixels.append(_value("roi_pixels", shape, "float32", "RGB in [0, 1] of each RoI, 127 / 255 beyond the image"))
        shape = ["N", PIXEL_SIDE, PIXEL_SIDE]
        outputs.append(_value("aligned", shape, "float32", "refined probabilities of pixels, RoI frame"))
    if refiner.model.gain_predictor is not None:
        outputs.append(_value("gain", ["N"], "float32", "predicted gain of Boundary IoU"))
    starts, segmenter = [], None
    if refiner.model.segmenter is not None and options.proposes:
        starts = [
            _value("given", ["N", side, side], "float32", "coarse probabilities before the segmenter, RoI frame"),
            _value(
                "proposals",
                ["N", 2],
                "float32",
                "IoU of each proposal with the coarse mask, and its quality; -1 once one was refused",
            ),
        ]
        sides = [proposals.CROP_SIDE, proposals.CROP_SIDE]
        map_sides = [side // MASK_STRIDE for side in sides]
        segmenter = {
            "inputs": [
                _value("pixels", ["N", 3, *sides], "float32", "RGB in [0, 1]"),
                _value("boxes", ["N", 4], "float32", "xyxy, pixels of these"),
            ],
            "outputs": [
                _value("logits", ["N", CANDIDATES, *map_sides], "float32", "of the masks proposed"),
                _value("quality", ["N", CANDIDATES], "float32", "expected IoU of each"),
            ],
            "crop_span": proposals.CROP_SPAN,
            "least_agreement": proposals.LEAST_AGREEMENT,
        }
    return {
        "format_version": runtime.FORMAT_VERSION,
        "segmenter": segmenter,
        "feature_source": config.feature_source,
        "image_encoder": {
            "inputs": [_value("pixels", ["B", 3, "H", "W"], "float32", "RGB in [0, 1]; H and W are multiples of 32")],
            "outputs": maps,
        }
        if has_encoder
        else None,
        "refiner": {
            "inputs": [
                *maps,
                _value("rois", ["N", 4], "float32", "xyxy, pixels of the image that the maps are of"),
                _value("image", ["N"], "int64", "which of the B images each RoI lies in"),
                _value("coarse", ["N", side, side], "float32", "coarse probabilities, RoI frame"),
                *pixels,
                *starts,
            ],
            "outputs": outputs,
        },
        "passes": config.passes if options.passes is None else options.passes,
        "again_if_iou_below": options.again_if_iou_below,
        "max_nodes": list(budget),
        "incoherence_threshold": options.incoherence_threshold,
        "mask_threshold": options.mask_threshold,
        "keep_if_iou_below": options.keep_if_iou_below,
        "keep_if_gain_below": options.keep_if_gain_below,
        "box_margin": config.box_margin if options.box_margin is None else options.box_margin,
        "roi_side": side,
        "pixel_side": PIXEL_SIDE if aligns else None,
        "crop_side": CROP_SIDE,
        "crop_span": CROP_SPAN,
        "outside": OUTSIDE,
        "least_change": LEAST_CHANGE,
    }


def _value(name: str, shape: list[Any], dtype: str, meaning: str = "features") -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype, "meaning": meaning}


def _write(directory: Path, files: dict[str, bytes], config: dict[str, Any]) -> Path:
    for name, content in files.items():
        write_atomic(directory / name, content)
    write_json_atomic(directory / "config.json", config)
    return directory
