"""What the transformer is compared with: the same refiner with another network in its place.

A baseline is a :class:`BaselineModel`: a refiner's model whose configuration names the network. It trains in the
package's own loop, is saved by it, and is measured by the same benchmarks; :func:`load_refiner` loads either kind.
``Refiner.from_pretrained`` refuses a baseline, since the package has none of these networks.
"""

from .model import BaselineConfig, BaselineModel, load_refiner, with_network
from .networks import NETWORKS

__all__ = ["NETWORKS", "BaselineConfig", "BaselineModel", "load_refiner", "with_network"]
