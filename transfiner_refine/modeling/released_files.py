"""Released models as files: original checkpoints in, ``config.json`` and strict safetensors out and in again.

Of a checkpoint's pickle, tensors and plain containers are read and nothing is run. A directory appears whole or not at
all.
"""

import hashlib
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.modeling.files import CONFIG, WEIGHTS, read_config, write_weights
from transfiner_refine.modeling.released_detector import PIXEL_MEANS, ReleasedNetwork, cell_anchors
from transfiner_refine.modeling.released_layout import MASK_HEAD, MODEL_NAMES, KeyReport, ReleasedConfig, translate

RECORD = "conversion.json"
DETECTRON2 = "detectron2_mask_rcnn.pth"

COARSE_MASK_HEAD = tuple(
    f"{MASK_HEAD}{layer}." for layer in ("mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4", "deconv", "predictor")
)
"""Prefixes of what Detectron2's own mask head has too."""


@dataclass(frozen=True)
class Conversion:
    """What came of a checkpoint.

    Attributes:
        config: Architecture that the keys told, with default settings.
        report: What became of every key.
    """

    config: ReleasedConfig
    report: KeyReport


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an original ``.pth`` file.

    Args:
        path: Made by ``torch.save``: a state dict, or a dict with one as ``"model"``.

    Returns:
        Tensors on the CPU, by their original names.

    Raises:
        WeightsError: If the file is missing or damaged, holds anything but tensors and plain values, or no state dict.
    """
    if not path.is_file():
        raise WeightsError(f"expected a checkpoint file, got {path}, which is no file: check the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # torch itself does not compare the checksums
            if broken:
                raise WeightsError(f"{path} is damaged, the checksum of {broken} is wrong: download it again")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"expected tensors and plain values alone in {path}, got the code of {refused[1]}, which was not run: "
                "use the file that the authors published"
            ) from error
        raise WeightsError(f"{path} is damaged or no file of torch.save: download it again") from error
    except WeightsError:
        raise
    except Exception as error:  # the reader of a damaged file can fail in any way
        raise WeightsError(f"{path} is damaged or no file of torch.save: download it again") from error
    tensors = payload.get("model", payload) if isinstance(payload, Mapping) else payload
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise WeightsError(
            f"expected a state dict in {path}, or a dict with one as 'model', got {_described(tensors)}: "
            "this is no checkpoint of Detectron2"
        )
    return dict(tensors)


def translate_checkpoint(config: ReleasedConfig, original: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], KeyReport]:
    """Translate all tensors of a checkpoint, strictly.

    Raises:
        WeightsError: As :func:`transfiner_refine.modeling.released_layout.translate`.
    """
    constants = {
        "pixel_mean": torch.tensor(PIXEL_MEANS),
        "pixel_std": torch.ones(3),
        **{f"proposal_generator.anchor_generator.cell_anchors.{i}": a for i, a in enumerate(cell_anchors())},
    }
    return translate(original, _expected(config), MODEL_NAMES, constants)


def convert_checkpoint(
    checkpoint: Path, output: Path, *, source: Mapping[str, Any] | None = None, detectron2: bool = True
) -> Conversion:
    """Convert an original checkpoint to a directory.

    Args:
        checkpoint: The ``.pth`` file.
        output: Directory to make: ``config.json``, ``model.safetensors`` (float32), ``conversion.json`` (source,
            hashes and every key) and, if wanted, the detector and its coarse mask head for Detectron2.
        source: Where the checkpoint came from, for the record.
        detectron2: Whether to write ``detectron2_mask_rcnn.pth``, whose keys are plain Detectron2's.

    Raises:
        WeightsError: If the checkpoint cannot be read or is of another model. Nothing is written then.
        InvalidInputError: If ``output`` exists and is no empty directory, or cannot be made.
    """
    _check_output(output)
    original = read_checkpoint(checkpoint)
    try:
        config = ReleasedConfig.from_keys(original)
        weights, report = translate_checkpoint(config, original)
    except WeightsError as error:
        raise WeightsError(f"{checkpoint}: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        write_weights(folder / WEIGHTS, weights)
        if detectron2:
            plain = {key: original[key] for key in report.used if not _is_mask_key(key) or _is_coarse_key(key)}
            torch.save({"model": plain}, folder / DETECTRON2)
        record = {
            "source": {"file": checkpoint.name, **file_identity(checkpoint), **(source or {})},
            "weights_sha256": file_identity(folder / WEIGHTS)["sha256"],
            **asdict(report),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        os.replace(folder, output)
    return Conversion(config, report)


def _check_output(output: Path) -> None:
    """Make sure that a directory can be made or filled, before the work that it waits for; nothing is left behind."""
    try:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise InvalidInputError(
                f"expected a new or an empty directory to write to, got {output}, which has content"
            )
        place = next(folder for folder in output.absolute().parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=place):  # permissions alone do not tell, as in /proc
            pass
    except OSError as error:
        raise InvalidInputError(
            f"expected a directory {output} that can be made, got: {error.strerror}; choose another output"
        ) from error


def load_directory(directory: Path) -> tuple[ReleasedConfig, dict[str, Tensor]]:
    """Read a converted model.

    Returns:
        Its config, and float32 tensors with our names.

    Raises:
        WeightsError: If a file is missing or damaged, or the weights do not fit the config.
    """
    config = _load_config(directory)
    path = directory / WEIGHTS
    try:
        weights = load_file(path)
        record = directory / RECORD  # made by a conversion, not by every source of a directory
        recorded = json.loads(record.read_text(encoding="utf-8"))["weights_sha256"] if record.exists() else None
    except FileNotFoundError as error:
        raise WeightsError(f"expected {CONFIG} and {WEIGHTS} in {directory}, {WEIGHTS} is missing") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"the model in {directory} is damaged ({error}): convert or download it again") from error
    if recorded is not None and file_identity(path)["sha256"] != recorded:
        raise WeightsError(
            f"expected {path} of sha256 {recorded}, got another: it was changed after the conversion; "
            "convert or download it again"
        )
    expected = {name: value.shape for name, value in _expected(config).items()}
    found = {name: value.shape for name, value in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise WeightsError(
            f"{path} does not fit its {CONFIG}: {len(wrong)} of {len(expected)} tensors are missing, unexpected or of "
            f"another shape, the first is {wrong[0]!r}; convert the checkpoint again"
        )
    return config, {name: value.float() for name, value in weights.items()}


def file_identity(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as ``{"size": ..., "sha256": ...}``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _load_config(directory: Path) -> ReleasedConfig:
    path = directory / CONFIG
    values = read_config(directory, "convert or download the model again")
    known = {field.name for field in fields(ReleasedConfig)}
    if not isinstance(values, dict) or "model_type" not in values or set(values) - known:
        raise WeightsError(
            f"expected the config of a released model in {path}, got another's: "
            "a refiner loads with Refiner.from_pretrained"
        )
    try:
        return ReleasedConfig(**values)
    except (InvalidInputError, TypeError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _expected(config: ReleasedConfig) -> dict[str, Tensor]:
    """Our state dict of a model, on the meta device."""
    with torch.device("meta"):
        return ReleasedNetwork(config).state_dict()


def _is_mask_key(key: str) -> bool:
    return key.startswith("roi_heads.mask_")


def _is_coarse_key(key: str) -> bool:
    return key.startswith(COARSE_MASK_HEAD)


def _described(value: Any) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    return f"a dict of {len(value)} values with the keys {', '.join(map(repr, list(value)[:3]))}"
