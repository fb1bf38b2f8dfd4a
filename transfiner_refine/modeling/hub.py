"""Where refiners are kept: the package, a directory, or the Hugging Face Hub.

A model is ``config.json`` and ``model.safetensors``; weights are stored in half precision, or as bytes with a scale for
each row, and load strictly.
"""

import json
import os
import tempfile
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from transfiner_refine.config import TransfinerConfig
from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.modeling.files import CONFIG, WEIGHTS, packed, read_config, unpacked, write_weights
from transfiner_refine.modeling.model import RefinerModel

EMBEDDED = Path(__file__).parent.parent / "pretrained"
CARD = "README.md"

STORED = torch.float16, torch.float32, torch.int8
"""Dtypes in which weights are stored."""


def find_model(
    name_or_path: str | Path | None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Find a model's directory, downloading it if it is a Hub id.

    Args:
        name_or_path: None for the embedded model, a directory, or a Hub id ``"org/name"``.
        revision: Branch, tag or commit on the Hub.
        cache_dir: Hub cache; None for huggingface_hub's own.
        local_files_only: Whether to use the cache alone.
        token: Hub token.

    Returns:
        Directory with the config and the weights.

    Raises:
        WeightsError: If there is no such directory or repository, or it cannot be reached.
    """
    if name_or_path is None:
        return EMBEDDED
    path = Path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WeightsError(
            f"expected a directory or a Hub id like 'org/name', got {name!r}: there is no such directory"
        )
    download = partial(hf_hub_download, name, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    try:
        folder = Path(download(CONFIG, revision=revision)).parent
        # Named by its commit, from which the weights must come too: a branch may move on between the two requests.
        download(WEIGHTS, revision=folder.name)
    except GatedRepoError as error:
        raise WeightsError(f"{name} is gated: accept its terms on the Hub, then pass token= or log in") from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"expected a model repository, got {name!r}, which does not exist or is private: check the name, or pass "
            "token="
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"{name} has no revision {revision!r}: check its branches and tags") from error
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{name} is not in the local cache and the Hub cannot be reached: connect once, or pass a directory"
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(f"expected {CONFIG} and {WEIGHTS} in {name}, one is missing: is it a refiner?") from error
    except HFValidationError as error:
        raise WeightsError(f"expected a directory or a Hub id like 'org/name', got {name!r}: {error}") from error
    # A broken connection is an error of the client's HTTP library, which differs from version to version.
    except Exception as error:
        raise WeightsError(
            f"{name} could not be downloaded: {_one_line(error)}; try again, or pass a directory"
        ) from error
    return folder


def load_config(directory: Path) -> TransfinerConfig:
    """Read ``config.json``.

    Raises:
        WeightsError: If the file is missing, is not JSON, or holds unknown or impossible fields.
    """
    path = directory / CONFIG
    values = read_config(directory, "download or save the model again")
    known = {f.name for f in fields(TransfinerConfig)}
    if not isinstance(values, dict) or set(values) - known:
        got = sorted(set(values) - known) if isinstance(values, dict) else type(values).__name__
        raise WeightsError(f"expected the fields of TransfinerConfig in {path}, got {got}: is it a refiner's config?")
    try:
        return TransfinerConfig(**values)
    except (InvalidInputError, TypeError) as error:
        raise WeightsError(f"{path}: {error}") from error


def load_model(directory: Path) -> RefinerModel:
    """Build a model and load its weights strictly, in float32.

    Raises:
        WeightsError: If a file is missing or damaged, or the weights are of another architecture.
    """
    config = load_config(directory)
    path = directory / WEIGHTS
    try:
        weights = unpacked(load_file(path))
    except FileNotFoundError as error:
        raise WeightsError(f"expected {CONFIG} and {WEIGHTS} in {directory}, {WEIGHTS} is missing") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}): download or save the model again") from error
    # Built without storage: every parameter comes from the file, so none is initialised for nothing.
    try:
        with torch.device("meta"):
            model = RefinerModel(config)
    except InvalidInputError as error:
        raise WeightsError(f"{directory / CONFIG}: {error}") from error
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise WeightsError(
            f"{path} does not fit its {CONFIG}: {len(wrong)} of {len(expected)} tensors are missing, unexpected or of "
            f"another shape, the first is {wrong[0]!r}; use the config that was saved with these weights"
        )
    if wrong := [name for name, value in weights.items() if not (value.is_floating_point() and value.isfinite().all())]:
        raise WeightsError(f"{path} holds weights that are no finite numbers, the first in {wrong[0]!r}: save it again")
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=True, assign=True)
    return model


def save_model(model: RefinerModel, directory: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model; each file is complete or untouched.

    Args:
        model: The model.
        directory: Created if needed.
        dtype: Dtype of the stored weights; ``torch.int8`` stores a scale for each row besides.

    Returns:
        The directory.

    Raises:
        InvalidInputError: If weights cannot be stored in ``dtype``.
        WeightsError: If a weight is not finite, or too large for ``dtype``, or the directory cannot be made.
    """
    if dtype not in STORED:
        raise InvalidInputError(f"expected a dtype among {STORED} to store weights in, got {dtype}")
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = packed(weights) if dtype == torch.int8 else {name: value.to(dtype) for name, value in weights.items()}
    if wrong := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise WeightsError(
            f"expected finite weights within the range of {dtype}, got others in {len(wrong)} tensors, the first "
            f"{wrong[0]!r}: the training that they are from has diverged"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"expected a directory to save to, got {directory}: {error.strerror}") from error
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        temporary = Path(scratch)
        write_weights(temporary / WEIGHTS, weights)
        (temporary / CONFIG).write_text(json.dumps(asdict(model.config), indent=2) + "\n", encoding="utf-8")
        if not (directory / CARD).exists():  # one that is there may have been written by hand
            (temporary / CARD).write_text(model_card(model.config), encoding="utf-8")
        for path in list(temporary.iterdir()):
            os.replace(path, directory / path.name)
    return directory


def push_model(
    model: RefinerModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload refiner",
) -> str:
    """Upload a model to the Hub, creating the repository if needed; returns the commit's URL.

    Raises:
        WeightsError: If the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_model(model, Path(scratch) / "model")
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
            return commit.commit_url
    except Exception as error:  # as in find_model; the upload of large files also raises RuntimeError and ValueError
        raise WeightsError(
            f"{repo_id} could not be uploaded: {_one_line(error)}; check the name and the token's rights"
        ) from error


def _one_line(error: Exception) -> str:
    """The message of an error of the client, which may have several lines, or none."""
    return " ".join(str(error).split()) or type(error).__name__


def model_card(config: TransfinerConfig) -> str:
    """A model card that says what is known from the configuration alone."""
    source = "its own image encoder" if config.feature_source == "image_encoder" else config.feature_source
    return f"""---
library_name: transfiner-refine
pipeline_tag: image-segmentation
tags: [mask-refinement, instance-segmentation]
---

# Mask refiner

Refines the coarse masks of any detector by the method of *Mask Transfiner for High-Quality Instance Segmentation*
(CVPR 2022). Features: {source}; {config.layers} layers of {config.channels} channels; quadtree depth {config.depth}.

```python
from transfiner_refine import Refiner

refined = Refiner.from_pretrained("org/name").refine(image, boxes=boxes, masks=masks)
```

Training data, figures and limits are to be filled in by whoever trained it.
"""
