"""Released models by name: downloaded from where the authors put them, verified, converted, kept as safetensors.

A download is compared with the size and hash that the Hub states, and with those of the first time that this machine
saw the file, which stay recorded when the model itself is deleted.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import cached_assets_path, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from transfiner_refine.errors import WeightsError
from transfiner_refine.modeling.files import CONFIG
from transfiner_refine.modeling.hub import find_model
from transfiner_refine.modeling.released_files import convert_checkpoint, file_identity

SPACE = "lkeab/transfiner"
PREFIX = "released/"


@dataclass(frozen=True)
class ReleasedSource:
    """Where a released checkpoint is.

    Attributes:
        drive_id: Of the file on Google Drive, from the authors' README, for a download by hand.
        file: Its name in the authors' Space on the Hugging Face Hub; None if it is not there.
        revision: Commit of the Space that holds it.
    """

    drive_id: str
    file: str | None = None
    revision: str = "main"


SOURCES = {
    "released/r50-1x": ReleasedSource("1IHNEs7PLGaw2gftHzMIOAxFzlYVPMc26"),
    "released/r50-3x": ReleasedSource(
        "1EA9pMdUK6Ad9QsjaZz0g5jqbo_JkqtME", "output_3x_transfiner_r50.pth", revision="30204ee"
    ),
    "released/r50-dcn-3x": ReleasedSource(
        "1N0C_ZhES7iu8qEPG2mrdxf8rWteemxQD", "output_3x_transfiner_r50_deform.pth", revision="b65bf73"
    ),
    "released/r101-3x": ReleasedSource("1Jn27jTpFFWjuX22xvR1upP99nOXfZ1nk"),
    "released/r101-dcn-3x": ReleasedSource("1TpVQksuaXlhioD3WqWppX84MB-l_Eb7-", "output_3x_transfiner_r101_deform.pth"),
}
"""The published COCO checkpoints with a ResNet, by name."""


def find_released(
    name_or_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Find a converted model's directory, downloading and converting it if need be.

    Args:
        name_or_path: A name in ``SOURCES``; a directory that ``transfiner-refine convert`` wrote; or a Hub id
            ``"org/name"`` of such a directory.
        cache_dir: Where models by name are kept; None for the assets in huggingface_hub's cache.
        local_files_only: Whether to use what is there alone.
        token: Hub token.

    Raises:
        WeightsError: If it is not there and cannot be had, or is damaged.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or Path(name).is_dir() or not name.startswith(PREFIX):
        return find_model(name_or_path, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    if name not in SOURCES:
        raise WeightsError(f"expected one of {', '.join(SOURCES)}, got {name!r}")
    shelf = cached_assets_path("transfiner_refine", "released", assets_dir=cache_dir)
    folder = shelf / name.removeprefix(PREFIX)
    if not (folder / CONFIG).exists():
        if local_files_only:
            raise WeightsError(f"{name} is not in {shelf}: connect once without local_files_only")
        _download(name, folder, token)
    return folder


def _download(name: str, folder: Path, token: str | bool | None) -> None:
    """Fetch, verify and convert a checkpoint into ``folder``."""
    source = SOURCES[name]
    by_hand = (
        f"download https://drive.google.com/file/d/{source.drive_id} by hand and run "
        "transfiner-refine convert CHECKPOINT --output DIRECTORY"
    )
    if source.file is None:
        raise WeightsError(f"{name} is published on Google Drive alone: {by_hand}")
    # A cache of its own: an interrupted download goes on where it stopped, and nothing stays after the conversion.
    partial = folder.with_name(f"{folder.name}.download")
    try:
        path = hf_hub_download(
            SPACE, source.file, repo_type="space", revision=source.revision, cache_dir=partial, token=token
        )
    except LocalEntryNotFoundError as error:
        raise WeightsError(f"{name} is not cached and the Hub cannot be reached: connect, or {by_hand}") from error
    except Exception as error:  # also those of the client's HTTP library, which it does not wrap and may exchange
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{name} could not be downloaded ({reason}): try again, or {by_hand}") from error
    checkpoint = Path(path)
    try:
        identity = file_identity(checkpoint)
        stated = checkpoint.resolve().name  # the Hub's cache names a file by its ETag: of a large one, its SHA-256
        if re.fullmatch("[0-9a-f]{64}", stated) and identity["sha256"] != stated:
            raise WeightsError(f"expected {source.file} of sha256 {stated}, got {identity['sha256']}: try again")
        seen = folder.with_name(f"{folder.name}.seen.json")
        _compare(identity, seen, name)
        origin = {"space": SPACE, "revision": checkpoint.parent.name, "file": source.file}
        convert_checkpoint(checkpoint, folder, source=origin, detectron2=False)
        seen.write_text(json.dumps(identity) + "\n", encoding="utf-8")
    finally:
        # Also after an error: a damaged download must not be taken for a good one by the next attempt.
        shutil.rmtree(partial, ignore_errors=True)


def _compare(identity: dict, seen: Path, name: str) -> None:
    """Compare a download with the first one."""
    if not seen.exists():
        return
    try:
        first = json.loads(seen.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{seen} is damaged ({error}): delete it to accept {name} as it is now") from error
    if first != identity:
        raise WeightsError(
            f"expected {name} of {first}, as it was first seen here, got {identity}: it was replaced or tampered with; "
            f"delete {seen} to accept it"
        )
