"""The networks that stand in the transformer's place, by name; each is a MaskTransfiner that differs in one part.

A further one needs a line in ``NETWORKS``. What the package calls, in training and inference, are ``forward`` and
``refine_nodes`` of a MaskTransfiner, and its parts.
"""

from collections.abc import Callable

from transfiner_refine.config import ROOT_SIDE, TransfinerConfig
from transfiner_refine.modeling.transfiner import MaskTransfiner

from .grids import GRID_NETWORKS, on_grid
from .nodes import mlp
from .regions import boundary, without_level

NETWORKS: dict[str, Callable[[TransfinerConfig], MaskTransfiner]] = {
    "transformer": MaskTransfiner,
    "mlp": mlp,
    "boundary": boundary,
    **{f"without_{ROOT_SIDE << level}": without_level(level) for level in (0, 1, 2)},
    **{f"{kind}_{ROOT_SIDE << level}": on_grid(kind, level) for kind in GRID_NETWORKS for level in (0, 1)},
}
"""``transformer`` is the package's own, untrained: the control of an ablation. ``mlp`` is PointRend's idea, on the same
nodes. ``boundary``, and ``without_28`` to ``without_112``, are the transformer on other nodes (paper, Table 2). The
others refine all cells of one resolution (Tables 6 and 7): ``cnn_28``, ``transformer_56`` ...
"""
