import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou

from experiments.transfer.cascade import STAGES, CascadeRoIHeads, refine
from experiments.transfer.detectors import DetectorSpec

CHANNELS, CLASSES, WIDTH = 4, 3, 8
SHAPES = [(64, 64), (48, 64)]


def head(overlap: float = 0.5) -> RoIHeads:
    pool = MultiScaleRoIAlign(["0"], output_size=2, sampling_ratio=2)
    return RoIHeads(
        pool,
        TwoMLPHead(CHANNELS * 4, WIDTH),
        FastRCNNPredictor(WIDTH, CLASSES),
        overlap,
        overlap,
        16,
        0.25,
        None,
        0.05,
        0.5,
        100,
    )


def features() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"0": torch.randn(2, CHANNELS, 16, 16, generator=draw)}


def proposals() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 30, 2, generator=draw) * 20
    return list(torch.cat([corners, corners + 10 + corners.flip(1)], 2))


def targets() -> list[dict[str, Tensor]]:
    boxes = [torch.tensor([[4.0, 4, 30, 30], [30, 30, 60, 60]]), torch.zeros(0, 4)]
    labels = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)]
    return [{"boxes": one, "labels": two} for one, two in zip(boxes, labels, strict=True)]


class Constant(nn.Module):
    """A predictor that says the same of every box."""

    def __init__(self, logits: list[float], regression: list[float]) -> None:
        super().__init__()
        self.logits, self.regression = torch.tensor(logits), torch.tensor(regression)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        count = len(pooled)
        return self.logits.expand(count, -1).clone(), self.regression.expand(count, -1).clone()


def still(*logits: float) -> Constant:
    return Constant(list(logits), [0.0] * 4 * len(logits))


def paper_cascade() -> CascadeRoIHeads:
    torch.manual_seed(0)
    return CascadeRoIHeads.like(head(), CLASSES, CHANNELS)


def test_one_stage_has_the_losses_of_the_single_head() -> None:
    torch.manual_seed(0)
    single = head()
    cascade = CascadeRoIHeads([single], [1.0])
    torch.manual_seed(1)
    _, expected = single(features(), proposals(), SHAPES, targets())
    torch.manual_seed(1)
    detections, losses = cascade(features(), proposals(), SHAPES, targets())
    assert detections == []
    assert losses["loss_classifier_1"] == expected["loss_classifier"]
    assert losses["loss_box_reg_1"] == expected["loss_box_reg"]


def test_one_stage_has_the_detections_of_the_single_head() -> None:
    torch.manual_seed(0)
    single = head().eval()
    cascade = CascadeRoIHeads([single], [1.0]).eval()
    expected, _ = single(features(), proposals(), SHAPES)
    detections, losses = cascade(features(), proposals(), SHAPES)
    assert losses == {}
    for one, other in zip(detections, expected, strict=True):
        assert len(one["boxes"]) > 0
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("stage", range(3))
def test_each_stage_has_its_overlap_from_which_a_box_is_an_object(stage: int) -> None:
    truth = torch.tensor([[0.0, 0, 10, 10]])
    # Parts of the truth, so that the overlaps are 0.41, 0.51, 0.61 and 0.71.
    boxes = torch.tensor([[0.0, 0, 10, 10 * share + 0.1] for share in (0.4, 0.5, 0.6, 0.7)])
    _, (labels,) = (
        paper_cascade()
        .stages[stage]
        .assign_targets_to_proposals([boxes], [truth], [torch.tensor([2])])
    )
    expected = box_iou(truth, boxes)[0] >= (0.5, 0.6, 0.7)[stage]
    assert (labels == 2).tolist() == expected.tolist()
    assert expected.tolist() == [False] * (stage + 1) + [True] * (3 - stage)


def test_later_stages_regress_smaller_corrections() -> None:
    coders = [stage.box_coder.weights for stage in paper_cascade().stages]
    assert coders == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]


def test_losses_of_later_stages_weigh_less() -> None:
    cascade = paper_cascade()
    assert cascade.weights == (1.0, 0.5, 0.25)
    torch.manual_seed(1)
    _, losses = cascade(features(), proposals(), SHAPES, targets())
    torch.manual_seed(1)
    _, plain = CascadeRoIHeads(list(cascade.stages), [1.0] * 3)(
        features(), proposals(), SHAPES, targets()
    )
    for name, loss in losses.items():
        weight = STAGES[int(name[-1]) - 1].weight
        torch.testing.assert_close(loss, weight * plain[name])


def test_all_stages_are_trained() -> None:
    cascade = paper_cascade()
    _, losses = cascade(features(), proposals(), SHAPES, targets())
    sum(losses.values(), torch.zeros(())).backward()
    assert len(losses) == 6
    for name, parameter in cascade.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_refined_boxes_are_those_of_the_likeliest_object_class() -> None:
    stage = head()
    box = torch.tensor([[10.0, 10, 20, 20]])
    # Background is the likeliest, then class 2, which moves by a whole width (10 of 10).
    regression = torch.zeros(1, 4 * CLASSES)
    regression[0, 8] = 10.0
    logits = torch.tensor([[5.0, 0.0, 1.0]], requires_grad=True)
    (refined,) = refine(stage, logits, regression, [box], [(64, 64)])
    torch.testing.assert_close(refined, torch.tensor([[20.0, 10, 30, 20]]))
    assert not refined.requires_grad


def test_refined_boxes_end_at_the_border_of_their_image() -> None:
    boxes = [torch.tensor([[10.0, 10, 200, 200]]), torch.tensor([[-5.0, 3, 100, 40]])]
    logits, regression = torch.zeros(2, CLASSES), torch.zeros(2, 4 * CLASSES)
    first, second = refine(head(), logits, regression, boxes, SHAPES)
    assert first.tolist() == [[10, 10, 64, 64]]
    assert second.tolist() == [[0, 3, 64, 40]]


def test_true_boxes_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = paper_cascade()
    seen: list[list[Tensor]] = []
    for stage in cascade.stages:
        stage.box_predictor = still(0.0, 0.0, 0.0)
        select = stage.select_training_samples

        def spy(given: list[Tensor], truth: list[dict[str, Tensor]], select=select):
            seen.append([boxes.clone() for boxes in given])
            return select(given, truth)

        monkeypatch.setattr(stage, "select_training_samples", spy)
    cascade(features(), proposals(), SHAPES, targets())
    for given in seen[1:]:
        assert 0 < len(given[0]) <= 16
        assert not (given[0][:, None] == targets()[0]["boxes"]).all(-1).any()


def test_scores_are_the_mean_of_the_posteriors() -> None:
    cascade = paper_cascade().eval()
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    for stage, row in zip(cascade.stages, logits.tolist(), strict=True):
        stage.box_predictor = still(*row)
    box = torch.tensor([[4.0, 4, 30, 30]])
    (found,), _ = cascade({"0": features()["0"][:1]}, [box], [(64, 64)])
    expected = logits.softmax(-1).mean(0)[1:]
    order = expected.argsort(descending=True)
    assert found["labels"].tolist() == (order + 1).tolist()
    torch.testing.assert_close(found["scores"], expected[order])
    torch.testing.assert_close(found["boxes"], box.expand(2, -1))


def test_images_without_objects_or_proposals_are_taken() -> None:
    cascade = paper_cascade()
    nothing = [targets()[1]] * 2
    _, losses = cascade(features(), [torch.zeros(0, 4), proposals()[1]], SHAPES, targets())
    assert all(loss.isfinite() for loss in losses.values())
    _, losses = cascade(features(), proposals(), SHAPES, nothing)
    assert all(losses[f"loss_box_reg_{number}"] == 0 for number in (1, 2, 3))
    found, _ = cascade.eval()(features(), [torch.zeros(0, 4)] * 2, SHAPES)
    assert [len(one["boxes"]) for one in found] == [0, 0]


@pytest.mark.slow
def test_cascade_over_fits_four_images() -> None:
    torch.manual_seed(0)
    spec = DetectorSpec(
        model="cascade_rcnn",
        min_size=64,
        max_size=64,
        trainable_layers=5,
        norm="batch",
        arguments={"box_batch_size_per_image": 64, "rpn_post_nms_top_n_train": 200},
    )
    model = spec.build(3)
    images = list(torch.rand(4, 3, 64, 64) * 0.3)
    truth = []
    for number, image in enumerate(images):
        left, top, side = 6 + 6 * number, 30 - 6 * number, 20 + 2 * number
        image[number % 2, top : top + side, left : left + side] = 1.0
        boxes = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        truth.append({"boxes": boxes, "labels": torch.tensor([number % 2 + 1])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(80):
        loss = sum(model(images, truth).values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(images)
    for one, other in zip(found, truth, strict=True):
        assert one["labels"][0] == other["labels"][0]
        assert one["scores"][0] > 0.8
        assert box_iou(one["boxes"][:1], other["boxes"]).item() > 0.8
