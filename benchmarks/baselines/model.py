"""A refiner's model with another network, and loading it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from transfiner_refine import Refiner
from transfiner_refine.config import TransfinerConfig
from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.modeling.files import WEIGHTS, read_config
from transfiner_refine.modeling.hub import find_model
from transfiner_refine.modeling.model import RefinerModel

from .networks import NETWORKS

FRESH = ("transfiner.sequence_encoder.", "transfiner.pixel_decoder.", "gain_predictor.")
"""Weights that a model that is given another network does not keep: the network's, and of what reads its results."""


@dataclass(frozen=True)
class BaselineConfig(TransfinerConfig):
    """A refiner's architecture with the name of its network.

    Attributes:
        network: One of ``NETWORKS``.
    """

    network: str = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in NETWORKS:
            raise InvalidInputError(f"expected a network among {sorted(NETWORKS)}, got {self.network!r}")


class BaselineModel(RefinerModel):
    """All weights of a baseline.

    Attributes:
        config: The architecture.
        image_encoder: None when a detector makes the features.
        transfiner: The network.
    """

    def __init__(self, config: BaselineConfig):
        super().__init__(config)
        self.transfiner = NETWORKS[config.network](config)


def with_network(model: RefinerModel, network: str, fresh: tuple[str, ...] = FRESH, **overrides: Any) -> BaselineModel:
    """Give a model another network; what is not fresh is copied: the encoder, the detector and the node encoder.

    Args:
        model: Any refiner's model, untouched.
        network: One of ``NETWORKS``.
        fresh: How the names of the weights begin that are not copied.
        **overrides: Fields of the configuration that differ; weights whose shape differs then start anew, too.

    Raises:
        InvalidInputError: If there is no such network, or a field is out of range.
    """
    values = {**asdict(model.config), "predicts_gain": False, **overrides, "network": network}
    baseline = BaselineModel(BaselineConfig(**values))
    known = baseline.state_dict()
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(fresh) and name in known and known[name].shape == value.shape
    }
    baseline.load_state_dict(known | weights)
    return baseline


def load_refiner(name_or_path: str | Path | None = None) -> Refiner:
    """Load a refiner or a baseline.

    Args:
        name_or_path: As for ``Refiner.from_pretrained``, or a directory with a baseline.

    Raises:
        WeightsError: If files are missing, damaged, or of another architecture.
    """
    folder = find_model(name_or_path)
    values = read_config(folder, "save the model again")
    if not isinstance(values, dict) or "network" not in values:
        return Refiner.from_pretrained(name_or_path)
    try:
        model = BaselineModel(BaselineConfig(**values))
        model.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    except (InvalidInputError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise WeightsError(f"expected a baseline of these benchmarks in {folder}, got: {error}") from error
    return Refiner(model)
