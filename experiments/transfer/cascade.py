"""Cascade R-CNN: box heads one after the other, each trained on what the one before has found.

Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection" (2018). Every
stage is one of torchvision's `RoIHeads`; this file only hands the boxes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import clip_boxes_to_image

# Channels between the two linear layers of a box head, and after them.
WIDTH = 1024

Features = dict[str, Tensor]
Target = dict[str, Tensor]
Shape = tuple[int, int]
# The boxes of each image (N, 4): x0, y0, x1, y1 [pixels].
Boxes = list[Tensor]


@dataclass(frozen=True)
class Stage:
    """What sets a stage apart.

    Attributes:
        overlap: Intersection over union from which on a proposal counts as an object.
        coder: Scales of the regression of x, y, width and height.
        weight: Weight of its losses.
    """

    overlap: float
    coder: tuple[float, float, float, float]
    weight: float


# Section 4 of the paper: later stages are stricter, and regress smaller corrections.
STAGES = (
    Stage(0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    Stage(0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    Stage(0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)


class CascadeRoIHeads(nn.Module):
    """Stands in the place of `RoIHeads` in a `GeneralizedRCNN`, for boxes alone.

    Args:
        stages: One of torchvision's heads for each stage.
        weights: Weight of each stage's losses.
    """

    def __init__(self, stages: Sequence[RoIHeads], weights: Sequence[float]) -> None:
        super().__init__()
        # Of any type, because torch does not know what the entries of a list can do.
        self.stages: Any = nn.ModuleList(stages)
        self.weights = tuple(weights)

    @classmethod
    def like(cls, single: RoIHeads, num_classes: int, channels: int) -> Self:
        """The stages of the paper, with the pooling, sampling and thresholds of a single head.

        Args:
            single: The head, whose layers are not used.
            num_classes: Classes, the background included.
            channels: Channels of the feature maps.
        """
        height, width = single.box_roi_pool.output_size
        stages = [
            RoIHeads(
                single.box_roi_pool,
                TwoMLPHead(channels * height * width, WIDTH),
                FastRCNNPredictor(WIDTH, num_classes),
                fg_iou_thresh=stage.overlap,
                bg_iou_thresh=stage.overlap,
                batch_size_per_image=single.fg_bg_sampler.batch_size_per_image,
                positive_fraction=single.fg_bg_sampler.positive_fraction,
                bbox_reg_weights=stage.coder,
                score_thresh=single.score_thresh,
                nms_thresh=single.nms_thresh,
                detections_per_img=single.detections_per_img,
            )
            for stage in STAGES
        ]
        return cls(stages, [stage.weight for stage in STAGES])

    def forward(
        self,
        features: Features,
        proposals: Boxes,
        image_shapes: list[Shape],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, of which there are none in training, and losses, only in training.

        Args:
            features: Feature maps of a batch, by the names that the pooling knows.
            proposals: Proposed boxes of each image.
            image_shapes: Height and width [pixels] of each image, without the padding.
            targets: Boxes and labels of each image; only in training.
        """
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(
        self, features: Features, proposals: Boxes, shapes: list[Shape], targets: list[Target]
    ) -> dict[str, Tensor]:
        losses = {}
        for number, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True), 1):
            sampled, _, labels, offsets = stage.select_training_samples(proposals, targets)
            logits, regression = _predict(stage, features, sampled, shapes)
            classifier, box = fastrcnn_loss(logits, regression, labels, offsets)
            losses[f"loss_classifier_{number}"] = weight * classifier
            losses[f"loss_box_reg_{number}"] = weight * box
            refined = refine(stage, logits, regression, sampled, shapes)
            # Without true boxes, which a stage adds to its proposals and the next one adds again.
            proposals = [
                boxes[~(before[:, None] == target["boxes"][None]).all(-1).any(-1)]
                for boxes, before, target in zip(refined, sampled, targets, strict=True)
            ]
        return losses

    def _detections(
        self, features: Features, proposals: Boxes, shapes: list[Shape]
    ) -> list[dict[str, Tensor]]:
        posteriors = []
        for number, stage in enumerate(self.stages, 1):
            logits, regression = _predict(stage, features, proposals, shapes)
            posteriors.append(logits.softmax(-1))
            if number < len(self.stages):
                proposals = refine(stage, logits, regression, proposals, shapes)
        # Logarithms, because the stage takes the softmax of what it is given.
        mean = torch.stack(posteriors).mean(0).log()
        found = self.stages[-1].postprocess_detections(mean, regression, proposals, shapes)
        return [
            {"boxes": boxes, "labels": labels, "scores": scores}
            for boxes, scores, labels in zip(*found, strict=True)
        ]


def _predict(
    stage: Any, features: Features, proposals: Boxes, shapes: list[Shape]
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and regression (N, 4 C) of the boxes of all images."""
    pooled = stage.box_roi_pool(features, proposals, shapes)
    logits, regression = stage.box_predictor(stage.box_head(pooled))
    return logits, regression


@torch.no_grad()
def refine(
    stage: Any,
    logits: Float[Tensor, "N C"],
    regression: Float[Tensor, "N 4*C"],
    proposals: Boxes,
    shapes: list[Shape],
) -> Boxes:
    """The boxes that a stage makes of its proposals: those of each one's likeliest object class.

    They have no gradient and do not reach beyond the image.
    """
    # The coder gives another shape where there are no boxes.
    decoded = stage.box_coder.decode(regression, proposals).reshape(*logits.shape, 4)
    foreground = logits[:, 1:].argmax(-1) + 1
    chosen = decoded[torch.arange(len(decoded), device=decoded.device), foreground]
    parts = chosen.split([len(boxes) for boxes in proposals])
    return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def cascade_rcnn(backbone: BackboneWithFPN, num_classes: int, **arguments: Any) -> FasterRCNN:
    """Cascade R-CNN on a feature pyramid.

    Args:
        backbone: Feature pyramid.
        num_classes: Classes, the background included.
        arguments: Further arguments of torchvision's `FasterRCNN`; overlaps and coder are the
            stages' own.
    """
    nothing = nn.Identity()
    model = FasterRCNN(backbone, box_head=nothing, box_predictor=nothing, **arguments)
    model.roi_heads = CascadeRoIHeads.like(model.roi_heads, num_classes, backbone.out_channels)
    return model
