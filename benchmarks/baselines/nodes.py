"""A network that refines the transformer's nodes without attention.

T tokens of all sequences, C channels.
"""

from torch import Tensor, nn

from transfiner_refine.config import TransfinerConfig
from transfiner_refine.modeling.transfiner import MaskTransfiner


class NodeMLP(nn.Module):
    """A multilayer perceptron that sees each node alone, as PointRend's point head does.

    Kirillov, Wu, He, Girshick, *PointRend: Image Segmentation as Rendering*, CVPR 2020. It has the layers of the
    sequence encoder without their attention, each widened by as many weights as the attention had: what it lacks is
    the view of the other nodes alone.
    """

    def __init__(self, config: TransfinerConfig):
        super().__init__()
        channels, hidden = config.channels, config.ffn_channels + 2 * config.channels
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, sequence: Tensor, count: int, key: Tensor | None = None) -> Tensor:
        """Encode tokens ``(T, C)``; which sequence and key each belongs to plays no part."""
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return self.norm(tokens)


def mlp(config: TransfinerConfig) -> MaskTransfiner:
    """The transformer replaced by an MLP on the same nodes."""
    transfiner = MaskTransfiner(config)
    transfiner.add_module("sequence_encoder", NodeMLP(config))
    return transfiner
