"""Download the cut-outs with alpha that training composes photos from: Debian's tuxpaint-stamps-default.

    python scripts/fetch_stamps.py STAMPS_DIR
    python scripts/train_embedded.py RUN_DIR --cache CACHE_DIR --stamps STAMPS_DIR

The package (161 MB) is under the GPL, version 2: it is used for training and never copied into this project. Its
SHA-256 is checked, and only PNG files are taken from it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path, PurePosixPath

from transfiner_refine.data.composite import load_stamps
from transfiner_refine.errors import InvalidInputError, TransfinerError

URL = "http://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
ROOT = PurePosixPath("usr/share/tuxpaint/stamps")


def member(package: bytes, name: str) -> bytes:
    """One file of a Debian package, which is an ``ar`` archive: 60-byte headers, contents padded to even length."""
    position = len(b"!<arch>\n")
    while position < len(package):
        header = package[position : position + 60]
        size = int(header[48:58])
        position += 60
        if header[:16].decode().strip().rstrip("/") == name:
            return package[position : position + size]
        position += size + size % 2
    raise InvalidInputError(f"expected {name} in the package, got an archive without it")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder for the PNG files")
    parser.add_argument("--package", type=Path, help="the package, if it is at hand already")
    args = parser.parse_args()
    try:
        if args.package:
            package = args.package.read_bytes()
        else:
            with urllib.request.urlopen(URL) as response:
                package = response.read()
        found = hashlib.sha256(package).hexdigest()
        if found != SHA256:
            raise InvalidInputError(f"expected a package with SHA-256 {SHA256}, got {found}: download it from {URL}")
        with tarfile.open(fileobj=io.BytesIO(member(package, "data.tar.xz")), mode="r:xz") as archive:
            for entry in archive:
                path = PurePosixPath(entry.name.removeprefix("./"))
                if not entry.isfile() or path.suffix != ".png" or ROOT not in path.parents or ".." in path.parts:
                    continue
                content = archive.extractfile(entry)
                assert content is not None
                target = args.output / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
        print(f"{len(load_stamps(args.output))} photographic cut-outs in {args.output}")
    except (TransfinerError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
