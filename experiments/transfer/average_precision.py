"""COCO's mean average precision of boxes and masks, over all processes together."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch import distributed as group

from mtkd_env import distributed
from mtkd_env.imports import optional

# Torchmetrics' names of the kinds, and ours.
KINDS: Mapping[str, str] = {"bbox": "box", "segm": "mask"}

# Over the overlaps 0.5, 0.55, ..., 0.95, at two of them, and of objects by their areas.
VALUES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")

Found = Mapping[str, Tensor]


class AveragePrecision:
    """Collects what a detector has found, and judges it.

    Args:
        masks: Whether there are masks, which are judged as well.
    """

    def __init__(self, *, masks: bool) -> None:
        self._kinds = tuple(KINDS) if masks else ("bbox",)
        # Processes may have unequal numbers of images, which the library cannot put together.
        self._metric = optional("torchmetrics.detection").MeanAveragePrecision(
            iou_type=self._kinds, backend="pycocotools", distributed_available_fn=lambda: False
        )
        # RetinaNet gives more than the 100 that count.
        self._metric.warn_on_many_detections = False

    def add(self, found: Sequence[Found], truth: Sequence[Found]) -> None:
        """Adds what was found on some images, and what is to be seen there.

        Args:
            found: Boxes, labels and scores, on the CPU; and masks (N, H, W), if there are.
            truth: Boxes, labels, marks of crowds and areas; and masks (N, H, W).
        """
        self._metric.update(found, truth)

    def values(self) -> dict[str, float]:
        """`box_map` first, then others in [0, 1]; without those of which there are no objects.

        All processes call it together and are told the same.
        """
        for name, own in self._metric.metric_state.items():
            setattr(self._metric, name, _joined(own))
        return distributed.agree(self._computed() if distributed.rank() == 0 else {})

    def _computed(self) -> dict[str, float]:
        found = self._metric.compute()
        prefixes = {kind: f"{kind}_" if len(self._kinds) > 1 else "" for kind in self._kinds}
        values = {
            f"{KINDS[kind]}_{name}": float(found[f"{prefix}{name}"])
            for kind, prefix in prefixes.items()
            for name in VALUES
        }
        # The library says -1 where nothing is to be found.
        return {name: value for name, value in values.items() if value >= 0}


def _joined(own: list[Any]) -> list[Any]:
    """The entries of all processes."""
    if not distributed.active():
        return own
    parts: list[list[Any]] = [[] for _ in range(distributed.processes())]
    group.all_gather_object(parts, own)
    return [entry for part in parts for entry in part]
