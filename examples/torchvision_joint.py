"""Fine-tune torchvision's Mask R-CNN and a refiner together, end to end, on a folder in COCO format.

    python examples/torchvision_joint.py --images photos --annotations annotations.json --weights
    python examples/torchvision_joint.py --images photos --annotations annotations.json --epochs 2

``--weights`` starts from ImageNet, which torchvision downloads once (45 MB), instead of random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from transfiner_refine import Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.data.coco import decode_masks
from transfiner_refine.data.datasets import CocoDataset, load_coco
from transfiner_refine.inputs import as_image, boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel


class DetectionData(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images with torchvision's targets."""

    def __init__(self, data: CocoDataset):
        self.data, self.annotations = data, data.by_image()
        self.labels = {category["id"]: label for label, category in enumerate(data.categories, start=1)}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.data.images[index]
        image = as_image(self.data.path_of(record)) / 255  # (3, H, W)
        found = [x for x in self.annotations[record["id"]] if not x.get("iscrowd")]
        masks = torch.from_numpy(decode_masks(found, range(len(found)), (image.shape[1], image.shape[2])))
        labels = torch.tensor([self.labels[x["category_id"]] for x in found], dtype=torch.int64)
        seen = masks.any(dim=2).any(dim=1)
        return image, {"boxes": boxes_from_masks(masks[seen]), "labels": labels[seen], "masks": masks[seen].byte()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--weights", action="store_true", help="start from ImageNet")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--input-side", type=int, default=480, help="shorter side of the detector's input in pixels")
    parser.add_argument("--output", type=Path, default=Path("outputs/torchvision_joint"))
    args = parser.parse_args()

    torch.manual_seed(0)
    data = DetectionData(load_coco(args.annotations, args.images))
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights="DEFAULT" if args.weights else None)
    adapter = adapt(MaskRCNN(backbone, num_classes=len(data.labels) + 1, min_size=args.input_side))
    refiner = Refiner(RefinerModel(adapter.config(channels=64, decoder="residual")))  # on the detector's own FPN
    model = adapter.with_refiner(refiner, max_rois=8).train()

    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    loader = DataLoader(data, batch_size=2, shuffle=True, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    for epoch in range(args.epochs):
        for images, targets in loader:
            losses = model(images, targets)  # the detector's own losses, loss_refine and loss_incoherence
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            print(f"epoch {epoch}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))
    model.save_pretrained(args.output)
    print(f"load with adapt(detector).with_refiner({str(args.output)!r})")


if __name__ == "__main__":
    main()
