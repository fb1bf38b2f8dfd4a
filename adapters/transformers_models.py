"""Query models of transformers by directory or Hub id: loaded, and given the classes of a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfiner_refine.adapters.saving import load_part
from transfiner_refine.adapters.transformers import TransformersAdapter
from transfiner_refine.adapters.transformers_hosts import HOSTS
from transfiner_refine.adapters.transformers_joint import LIBRARY
from transfiner_refine.errors import InvalidInputError, WeightsError


def build(name: str, categories: Sequence[Mapping[str, Any]]) -> TransformersAdapter:
    """Load a detector with its image processor for a data set.

    Args:
        name: Directory or Hub id.
        categories: COCO records of the classes in the order of their labels; class layers of another number of classes
            become new ones.

    Raises:
        InvalidInputError: If it is no detector with masks that the adapter serves.
        WeightsError: If it cannot be loaded.
    """
    names = {label: str(category.get("name", category["id"])) for label, category in enumerate(categories)}
    try:
        config = LIBRARY.AutoConfig.from_pretrained(name)
        kind = (config.architectures or ["a model without architectures"])[0]
        served = [key for key, host in HOSTS.items() if host.masks is not None]
        if kind not in served:
            raise InvalidInputError(f"expected one of {', '.join(served)} in {name!r}, got {kind}")
        model = getattr(LIBRARY, kind).from_pretrained(
            name,
            num_labels=len(names),
            id2label=names,
            label2id={text: label for label, text in names.items()},
            ignore_mismatched_sizes=config.num_labels != len(names),
        )
        processor = LIBRARY.AutoImageProcessor.from_pretrained(name)
    except InvalidInputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{name!r} could not be loaded: {reason}; check the directory or Hub id") from error
    adapter = TransformersAdapter(model, processor)
    adapter.recipe = {
        "kind": kind,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "processor": json.loads(processor.to_json_string()),
        "channels": adapter.channels,
    }
    return adapter


def restore(recipe: Mapping[str, Any], weights: Path) -> TransformersAdapter:
    """Build a detector again that was saved with its refiner.

    Args:
        recipe: That of its adapter.
        weights: The file that was saved with it.

    Raises:
        WeightsError: If the weights are missing, damaged, or of another architecture.
    """
    kind = getattr(LIBRARY, recipe["kind"])
    model = kind(kind.config_class.from_dict(dict(recipe["config"])))
    load_part(model, weights)
    values = dict(recipe["processor"])
    processor = getattr(LIBRARY, values["image_processor_type"]).from_dict(values)
    adapter = TransformersAdapter(model, processor, channels=recipe["channels"])
    adapter.recipe = dict(recipe)
    return adapter
