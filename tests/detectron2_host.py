"""Detectron2 for tests that compare with it: imported where it is installed, or from an unpacked source tree.

Its C++ extension is not needed for Mask R-CNN. A tree of release 0.6 predates the Pillow and numpy of today; what it
misses is put back before the import.
"""

import importlib.util
import os
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image


def import_detectron2() -> Any:
    """The package ``detectron2``, with the parts that warn while they are imported; skips the test without it."""
    tree = os.environ.get("TRANSFINER_DETECTRON2")
    if tree and tree not in sys.path:
        sys.path.append(tree)
    try:
        if importlib.util.find_spec("detectron2") is None:
            pytest.skip(
                "no detectron2: install it, or set TRANSFINER_DETECTRON2 to the folder of an unpacked source tree "
                "(and install fvcore, iopath, omegaconf, hydra-core, yacs, termcolor, tabulate, cloudpickle)",
                allow_module_level=True,
            )
        _put_back_what_it_misses()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in ("checkpoint", "config", "data.transforms", "engine", "modeling", "projects.point_rend"):
                importlib.import_module(f"detectron2.{part}")
        return importlib.import_module("detectron2")
    except ModuleNotFoundError as error:
        pytest.skip(
            f"detectron2 lacks {error.name}: install fvcore, iopath, omegaconf, hydra-core, yacs and the like",
            allow_module_level=True,
        )


def _put_back_what_it_misses() -> None:
    sys.modules.setdefault("detectron2._C", types.ModuleType("detectron2._C"))
    if "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")  # imported for configurations by name alone
    if not hasattr(Image, "LINEAR"):
        Image.LINEAR = Image.Resampling.BILINEAR  # type: ignore[attr-defined]
    for name, kind in {"bool": bool, "int": int, "float": float, "object": object}.items():
        if name not in np.__dict__:
            setattr(np, name, kind)


def mask_rcnn(*, min_size: int, score_threshold: float, limit: int) -> Any:
    """Stock Mask R-CNN R50 FPN with random weights, on the CPU."""
    config = importlib.import_module("detectron2.config").get_cfg()
    config.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True, "MODEL.WEIGHTS", ""),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 1000),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", score_threshold),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
            *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
            *("TEST.DETECTIONS_PER_IMAGE", limit, "INPUT.MIN_SIZE_TEST", min_size),
        ]
    )
    return importlib.import_module("detectron2.modeling").build_model(config).eval()


def small_config(*changes: Any) -> Any:
    """Settings of a small Mask R-CNN that finds something in any image; ``changes`` are keys and values in turn."""
    config = importlib.import_module("detectron2.config").get_cfg()
    config.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True, "MODEL.WEIGHTS", ""),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.RESNETS.NORM", "BN"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [96], [128]]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
            *("TEST.DETECTIONS_PER_IMAGE", 4, "INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 160),
        ]
    )
    config.merge_from_list(list(changes))
    return config
