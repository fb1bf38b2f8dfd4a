"""What MobileSAM, as a teacher, sees in the cut-outs of the training objects, collected once.

    python scripts/collect_features.py SAM_DIR FEATURES_DIR --cache CACHE_DIR [--data DIR]

SAM_DIR is MobileSAM's folder, see ``teacher.py``. FEATURES_DIR gets a file for each source of the training mix. An
interrupted command goes on where it was; ``--part 0 2`` and ``--part 1 2`` share the work between two processes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import teacher  # pyright: ignore[reportMissingImports]
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from dataset import DATA  # pyright: ignore[reportMissingImports]
from train_embedded import training_sources  # pyright: ignore[reportMissingImports]

from transfiner_refine.data.object_cache import CachedObject, ObjectCache

SIDE = 640
"""Longer side at which MobileSAM sees a cut-out; the object spans about 250 pixels of it."""

STRIDE = 16
CHANNELS = 256


class MobileSAM:
    """The image encoder."""

    def __init__(self, folder: Path):
        # Positions are relative to windows, so that the same weights serve photos of another size.
        self.encoder = teacher.code(folder).modeling.TinyViT(
            img_size=SIDE,
            num_classes=1000,
            embed_dims=[64, 128, 160, 320],
            depths=[2, 2, 6, 2],
            num_heads=[2, 4, 5, 10],
            window_sizes=[7, 7, 14, 7],
        )
        prefix = "image_encoder."
        own = {k.removeprefix(prefix): v for k, v in teacher.weights(folder).items() if k.startswith(prefix)}
        self.encoder.load_state_dict(own)
        self.encoder.eval()  # not before: it is here that the biases of attention are laid out
        self.mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        self.std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray) -> Tensor:
        """``(256, SIDE / 16, SIDE / 16)`` float32 features of ``(H, W, 3)`` uint8, resized and padded to a square."""
        scale = SIDE / max(rgb.shape[:2])
        height, width = (max(1, round(x * scale)) for x in rgb.shape[:2])
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = torch.from_numpy(cv2.resize(rgb, (width, height), interpolation=how)).permute(2, 0, 1)
        image = F.pad((image - self.mean) / self.std, (0, SIDE - width, 0, SIDE - height))
        tokens = self.encoder.patch_embed(image[None])
        for layer in self.encoder.layers:
            tokens = layer(tokens)
        return self.encoder.neck(tokens.transpose(1, 2).unflatten(2, (SIDE // STRIDE, SIDE // STRIDE)))[0]


class Features:
    """Features of the objects of one source, on disk.

    Args:
        folder: Where they are kept.
        cache: The cut-outs.
        write: Whether a file is made if there is none.
    """

    def __init__(self, folder: Path, cache: ObjectCache, write: bool = False):
        path = folder / f"{cache.name}.npy"
        side = SIDE // STRIDE
        if write and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, "w+", np.float16, (len(cache), CHANNELS, side, side)).flush()
        self.rows = np.load(path, mmap_mode="r+" if write else "r")

    def sampled(self, row: int, item: CachedObject, places: np.ndarray) -> Tensor:
        """Features at ``(h, w, 2)`` float32 places of the cut-out, continuous xy pixels: ``(256, h, w)``.

        Zero outside of the cut-out.
        """
        scale = SIDE / max(item.size)
        grid = torch.from_numpy(places).float() * (2 * scale / SIDE) - 1
        inside = ((places >= 0) & (places < np.array(item.size[::-1]))).all(-1)
        features = torch.from_numpy(self.rows[row].astype(np.float32))
        found = F.grid_sample(features[None], grid[None], align_corners=False, padding_mode="border")[0]
        return found * torch.from_numpy(inside)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mobile_sam", type=Path, help="folder with segment_any/mobile_sam and checkpoints")
    parser.add_argument("features", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "OF"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    encoder = MobileSAM(args.mobile_sam)
    caches = [ObjectCache(source, args.cache) for source in training_sources(args.data)]
    for cache, features in [(cache, Features(args.features, cache, write=True)) for cache in caches]:
        for row in tqdm(range(args.part[0], len(cache), args.part[1]), desc=cache.name):
            if not features.rows[row].any():
                features.rows[row] = encoder(cache.image(cache.objects[row])).numpy()


if __name__ == "__main__":
    main()
