"""The module that a refiner holds and saves: the Mask Transfiner, and the image encoder where it has one."""

import torch
from torch import Tensor, nn

from transfiner_refine.config import TransfinerConfig
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.efficientnet_lite import EfficientNetLite
from transfiner_refine.modeling.gain import GainPredictor
from transfiner_refine.modeling.image_encoder import ImageEncoder
from transfiner_refine.modeling.pixel_head import PixelHead
from transfiner_refine.modeling.segmenter import Segmenter
from transfiner_refine.modeling.transfiner import MaskTransfiner
from transfiner_refine.types import FeaturePyramid

IMAGE_ENCODER = "image_encoder"


class RefinerModel(nn.Module):
    """All weights of a refiner.

    Attributes:
        config: The architecture.
        image_encoder: None when a detector makes the features.
        transfiner: The paper's network.
        segmenter: None when refinement starts from the coarse masks.
        pixel_head: None when the outline stays as the quadtree left it.
        gain_predictor: None when the model does not predict gains.

    Raises:
        InvalidInputError: If the configuration asks for the image encoder with strides that it does not have, or for a
            segmenter without one.
    """

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        if config.feature_source == IMAGE_ENCODER and config.strides != EfficientNetLite.strides:
            raise InvalidInputError(
                f"expected strides {EfficientNetLite.strides}, those of the image encoder, got {config.strides}"
            )
        if config.segments and config.feature_source != IMAGE_ENCODER:
            raise InvalidInputError(
                f"expected segments false on the features of {config.feature_source!r}, got true: the segmenter goes "
                "with an image encoder"
            )
        self.config = config
        self.image_encoder = None
        if config.feature_source == IMAGE_ENCODER:
            self.image_encoder = ImageEncoder(config.feature_channels, config.backbone)
        self.transfiner = MaskTransfiner(config)
        self.pixel_head = PixelHead(config.pixel_widths) if config.pixel_widths else None
        self.segmenter = Segmenter() if config.segments else None
        self.gain_predictor = None
        if config.predicts_gain:
            sees_edges = self.pixel_head is not None
            self.gain_predictor = GainPredictor(sees_edges, sees_proposals=sees_edges and config.segments)

    def encode_crops(self, crops: Tensor) -> FeaturePyramid:
        """Features of a batch of training crops, ``(R, 3, H, W)`` uint8 RGB, by the image encoder."""
        assert self.image_encoder is not None
        return self.image_encoder((crops.float() / 255).contiguous(memory_format=torch.channels_last))
