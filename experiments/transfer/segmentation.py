"""Trains a segmenter that begins with a distilled backbone, and measures its mean IoU.

mtkd transfer segmentation --recipe cityscapes --data ROOT --output DIR
    --weights EXPORT/backbone.safetensors
mtkd transfer segmentation --dataset folder --classes 4 --data ROOT --output DIR
    --model pspnet --backbone resnet18 --crop '[64, 64]' --schedule.iterations 400
mtkd transfer segmentation --resume DIR
torchrun --nproc-per-node 8 experiments/transfer/segmentation.py --recipe ade20k ...
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode

from experiments.transfer.backbones import BACKBONES, fill, load_backbone
from experiments.transfer.label_maps import FOLDER, LABELLED, load_label_maps
from experiments.transfer.label_views import FILL, IGNORED, Labelled, fitted, padded
from experiments.transfer.program import TransferConfig
from experiments.transfer.schedule import Schedule
from experiments.transfer.training import TaskRun, VisionTask
from mtkd_env import distributed
from mtkd_env.data.augment import normalize
from mtkd_env.data.decoding import MEAN, STD
from mtkd_env.data.views import LARGEST_SEED
from mtkd_env.errors import ConfigError, check_name, lookup
from mtkd_env.imports import optional
from mtkd_env.precision import widen
from mtkd_env.seeding import derive_seed, seeded

# Longer side [pixels] of an image in pictures.
PANEL = 320

# Optional, and takes seconds to import. Its encoders are torchvision's ResNets without `fc`, with
# the same names of tensors, so that an exported backbone fills them as it is.
LIBRARY = "segmentation_models_pytorch"

# How much smaller the last feature map is than the image; heights and widths are multiples of it.
STRIDE = 8

# Classes of the library, and their arguments; the last two stages of the backbone are dilated.
SEGMENTERS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    # Chen et al., 2017.
    "deeplabv3": ("DeepLabV3", {"encoder_output_stride": STRIDE}),
    # Zhao et al., 2017. The library's default depth of 3 would leave these two stages out.
    "pspnet": ("PSPNet", {"encoder_depth": 5, "output_stride": STRIDE}),
}


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(TransferConfig):
    """The training of a segmenter.

    Attributes:
        model: deeplabv3 or pspnet.
        dataset: cityscapes, ade20k, coco_stuff or folder.
        classes: Number of classes of a folder; the other datasets have their own.
        crop: Height and width of what is trained on [pixels], multiples of 8.

    Raises:
        ConfigError: A value that cannot be used; names it.
    """

    model: str = "deeplabv3"
    dataset: str = FOLDER
    classes: int | None = None
    crop: tuple[int, int] = (512, 512)
    schedule: Schedule = field(
        default_factory=lambda: Schedule(kind="poly", lr=0.02, iterations=80_000)
    )
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(SEGMENTERS, self.model, "segmenter")
        check_name([*LABELLED, FOLDER], self.dataset, "dataset")
        if any(side < STRIDE or side % STRIDE for side in self.crop):
            raise ConfigError(f"crop: expected multiples of {STRIDE}, got {list(self.crop)}")
        if self.batch_size < 2:
            raise ConfigError(
                "batch_size: expected at least 2, because batch norms behind pooled images need "
                f"more than one, got {self.batch_size}"
            )


def build_segmenter(name: str, backbone: str, classes: int, seed: int) -> nn.Module:
    """An untrained segmenter, the same for the same seed; its `encoder` is the backbone.

    Args:
        name: Name in `SEGMENTERS`.
        backbone: Name in `BACKBONES`.
        classes: K.
        seed: Seed of all its tensors.

    Returns:
        A module from images (B, 3, H, W), H and W multiples of `STRIDE`, to logits (B, K, H, W).

    Raises:
        ConfigError: An unknown name, or the library is not installed.
    """
    kind, arguments = lookup(SEGMENTERS, name, "segmenter")
    check_name(BACKBONES, backbone, "backbone")
    make = getattr(optional(LIBRARY), kind)
    with seeded(seed):
        model: nn.Module = make(backbone, encoder_weights=None, classes=classes, **arguments)
    return model


class SegmentationTask(VisionTask):
    """A segmenter, its images, and the cross-entropy of their pixels.

    Args:
        config: The configuration, which says where the images are.
        device: Where to compute.

    Raises:
        ConfigError: Images that cannot be found, weights that do not fit the backbone, or batches
            that do not fit the images.
    """

    def __init__(self, config: SegmentationConfig, device: torch.device) -> None:
        data = load_label_maps(config.dataset, Path(config.data), config.classes)
        self.steps_per_epoch = config.steps_per_epoch(len(data.train))
        seed = derive_seed(config.seed, "segmenter")
        self.model = build_segmenter(config.model, config.backbone, data.num_classes, seed)
        if config.weights is not None:
            fill(self.model.get_submodule("encoder"), load_backbone(Path(config.weights)))
        self.model.to(device)
        self._config = config
        self._data = data
        self._device = device
        self._mean, self._std = torch.tensor(MEAN).to(device), torch.tensor(STD).to(device)

    def batches(self, epoch: int, begin: int = 0) -> Iterator[Labelled]:
        """Views of the images in a new order; the last ones may be left out."""
        seed = derive_seed(self._config.seed, f"images of epoch {epoch}")
        generator = torch.Generator().manual_seed(seed)
        count = len(self._data.train)
        order = torch.randperm(count, generator=generator)
        seeds = torch.randint(LARGEST_SEED, (count,), generator=generator)
        parts = order.split(self._config.batch_size)[begin : self.steps_per_epoch]
        requests = [
            list(zip(own.tolist(), seeds[own].tolist(), strict=True))
            for own in map(distributed.local_part, parts)
        ]
        views = partial(self._data.views, size=self._config.crop)
        for batch in self._config.read(views, requests, self._device):
            yield Labelled(*(part.to(self._device, non_blocking=True) for part in batch))

    def losses(self, batch: Labelled) -> dict[str, Tensor]:
        """Mean cross-entropy of the pixels that count, those of all processes together."""
        labels = batch.labels.long()
        logits = widen(self.model(self._normalized(batch.images)))
        total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        # The mean over the processes of what each has is that of the whole batch.
        counted = distributed.mean((labels != IGNORED).sum().to(total))
        return {"cross_entropy": total / counted.clamp(min=1)}

    def evaluate(self) -> dict[str, float]:
        """Mean IoU, mean accuracy of the classes, accuracy of the pixels; of whole images."""
        classes = self._data.num_classes
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=self._device)
        own = range(distributed.rank(), len(self._data.val), distributed.processes())
        for image, labels in self._config.read(self._data.whole, own, self._device):
            matrix += confusion(self.predict(image), labels.to(self._device), classes)
        return scores(distributed.total(matrix))

    def pictures(self, count: int) -> UInt8[Tensor, "N 3 H W"]:
        """Image, truth and prediction side by side, of the first images to evaluate on."""
        height, width = (PANEL * side // max(self._config.crop) for side in self._config.crop)
        rows = []
        for position in range(min(count, len(self._data.val))):
            image, labels = self._data.whole(position)
            prediction = self.predict(image).cpu()
            panels = [
                fitted(image, (height, width), InterpolationMode.BILINEAR),
                fitted(self._painted(labels), (height, width), InterpolationMode.NEAREST),
                fitted(self._painted(prediction), (height, width), InterpolationMode.NEAREST),
            ]
            rows.append(torch.cat(panels, dim=2))
        return torch.stack(rows)

    @torch.no_grad()
    def predict(self, image: UInt8[Tensor, "3 H W"]) -> Int64[Tensor, "H W"]:
        """The most probable class of each pixel of a whole image, on the device."""
        height, width = image.shape[1:]
        size = (height + -height % STRIDE, width + -width % STRIDE)
        inputs = self._normalized(padded(image, size, FILL)[None].to(self._device))
        return self.model(inputs)[0, :, :height, :width].argmax(0)

    def _normalized(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B 3 H W"]:
        return normalize(images, self._mean, self._std)

    def _painted(self, labels: Tensor) -> UInt8[Tensor, "3 H W"]:
        """Labels in the colours of their classes; black where none counts."""
        colors = torch.zeros(256, 3, dtype=torch.uint8)
        colors[: self._data.num_classes] = self._data.colors
        return colors[labels.long()].permute(2, 0, 1)


def confusion(
    predicted: Int64[Tensor, "H W"], labels: UInt8[Tensor, "H W"], classes: int
) -> Int64[Tensor, "K K"]:
    """How many pixels of each class (row) are taken for each class (column)."""
    counts = labels != IGNORED
    cells = labels[counts].long() * classes + predicted[counts]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def scores(matrix: Int64[Tensor, "K K"]) -> dict[str, float]:
    """Means over the classes and the pixels, as shares of 1.

    A class that is neither there nor taken for any pixel does not count.

    Args:
        matrix: Pixels of each class (row) that are taken for each class (column).

    Returns:
        `miou`, the mean over the classes of intersection by union; `mean_accuracy`, that of the
        share of a class's pixels that are taken for it; `pixel_accuracy`, the share of all pixels.

    Raises:
        ConfigError: No pixel counts.
    """
    counts = matrix.double()
    hits, truth = counts.diagonal(), counts.sum(1)
    union = truth + counts.sum(0) - hits
    if not union.any():
        raise ConfigError("data: no pixel of the images to evaluate on is of any class")
    return {
        "miou": float((hits / union)[union > 0].mean()),
        "mean_accuracy": float((hits / truth)[truth > 0].mean()),
        "pixel_accuracy": float(hits.sum() / truth.sum()),
    }


class SegmentationRun(TaskRun[SegmentationConfig]):
    """The training of a segmenter."""

    program = "mtkd transfer segmentation"
    config_type = SegmentationConfig
    task_type = SegmentationTask


main = SegmentationRun.main

if __name__ == "__main__":
    sys.exit(main())
