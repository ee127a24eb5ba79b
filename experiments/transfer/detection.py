r"""Trains a detector that begins with a distilled backbone, and measures its mean AP.

mtkd transfer detection --recipe coco_2x --data ROOT --output DIR \
    --model mask_rcnn --backbone resnet18 --weights EXPORT/backbone.safetensors
mtkd transfer detection --data ROOT --train shapes_train --val shapes_val \
    --output DIR --model retinanet --min_size 128 --max_size 128 --schedule.epochs 12
mtkd transfer detection --resume DIR
torchrun --nproc-per-node 8 experiments/transfer/detection.py --recipe coco_2x ...

ROOT holds COCO or something in its format; see `coco`.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from experiments.transfer.average_precision import AveragePrecision
from experiments.transfer.backbones import fill, load_backbone
from experiments.transfer.box_pictures import beside_truth
from experiments.transfer.coco import CocoSplit, Target, read_coco
from experiments.transfer.coco_batches import (
    Example,
    evaluation_requests,
    examples,
    training_requests,
)
from experiments.transfer.detectors import DetectorSpec, body
from experiments.transfer.program import TransferConfig
from experiments.transfer.schedule import Schedule
from experiments.transfer.training import TaskRun, VisionTask
from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import derive_seed, seeded

# From what probability on a pixel belongs to an object.
SURE = 0.5

# Images and what is to be seen on each, on the device.
Batch = tuple[list[Tensor], list[Target]]


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(DetectorSpec, TransferConfig):
    """The training of a detector.

    Attributes:
        train: Name of the split to train on: annotations/instances_<train>.json and its images in
            the folder <train>.
        val: Name of the split to judge by; likewise.
    """

    train: str = "train2017"
    val: str = "val2017"
    batch_size: int = 8
    schedule: Schedule = field(
        default_factory=lambda: Schedule(lr=0.01, milestones=(16, 22), warmup_steps=500, epochs=24)
    )


class DetectionTask(VisionTask):
    """A detector, its images, and the terms of its loss.

    Args:
        config: The configuration, which says where the images are.
        device: Where to compute.

    Raises:
        ConfigError: Images that cannot be read, or splits, weights or batches that do not fit
            together.
    """

    def __init__(self, config: DetectionConfig, device: torch.device) -> None:
        train, val = (read_coco(Path(config.data), name) for name in (config.train, config.val))
        _check_splits(train, val)
        self.steps_per_epoch = config.steps_per_epoch(len(train.learnable))
        with seeded(derive_seed(config.seed, "detector")):
            self.model = config.build(len(train.class_names))
        if config.weights is not None:
            fill(body(self.model), load_backbone(Path(config.weights)))
        self.model.to(device)
        self._config = config
        self._train, self._val = train, val
        self._device = device

    def batches(self, epoch: int, begin: int = 0) -> Iterator[Batch]:
        """The images with something on them in a new order; the last ones may be left out."""
        config = self._config
        requests = training_requests(
            self._train,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            begin=begin,
            shard=distributed.shard(),
        )
        make = partial(examples, split=self._train, masks=config.kind.masks)
        for batch in config.read(make, requests, self._device):
            targets = [
                {name: value.to(self._device, non_blocking=True) for name, value in target.items()}
                for _, target in batch
            ]
            yield self._images(batch), targets

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the detector's own loss."""
        images, targets = batch
        return self.model(images, targets)

    def evaluate(self) -> dict[str, float]:
        """COCO's mean average precision of boxes, and of masks if the detector makes them."""
        config, masks = self._config, self._config.kind.masks
        precision = AveragePrecision(masks=masks)
        size = config.batch_size // distributed.processes()
        requests = evaluation_requests(self._val, batch_size=size, shard=distributed.shard())
        make = partial(examples, split=self._val, masks=masks, truth=True)
        for batch in config.read(make, requests, self._device):
            precision.add(self.predict(batch), [truth for _, truth in batch])
        return precision.values()

    def pictures(self, count: int) -> UInt8[Tensor, "N 3 P Q"]:
        """Detections beside the truth, of the first images to judge by."""
        rows = []
        for position in range(min(count, len(self._val.images))):
            truth = self._val.truth(position, masks=self._config.kind.masks)
            image = self._val.image(position)
            (found,) = self.predict([(image, truth)])
            rows.append(beside_truth(image, found, truth, self._train.class_names))
        return torch.stack(rows)

    @torch.no_grad()
    def predict(self, batch: Sequence[Example]) -> list[Target]:
        """Boxes, labels, scores and perhaps masks that are found on images, on the CPU."""
        found: list[Target] = self.model(self._images(batch))
        for one in found if self._config.kind.masks else ():
            one["masks"] = one["masks"][:, 0] > SURE
        return [{name: value.cpu() for name, value in one.items()} for one in found]

    def _images(self, batch: Sequence[Example]) -> list[Float32[Tensor, "3 _ _"]]:
        """Images in [0, 1] on the device, which the detector itself normalises and resizes."""
        return [image.to(self._device, non_blocking=True).float() / 255 for image, _ in batch]


def _check_splits(train: CocoSplit, val: CocoSplit) -> None:
    if not train.learnable:
        raise ConfigError(f"train: no image in {train.file} has an object to learn from")
    if not val.learnable:
        raise ConfigError(f"val: no image in {val.file} has an object to find")
    if train.class_names != val.class_names or train.labels != val.labels:
        raise ConfigError(
            f"val: expected the {len(train.labels)} categories of {train.file}, found others in "
            f"{val.file}"
        )


class DetectionRun(TaskRun[DetectionConfig]):
    """The training of a detector."""

    program = "mtkd transfer detection"
    config_type = DetectionConfig
    task_type = DetectionTask


main = DetectionRun.main

if __name__ == "__main__":
    sys.exit(main())
