import json
import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchvision.models import get_model
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import FrozenBatchNorm2d

from experiments.transfer import detection
from experiments.transfer.average_precision import AveragePrecision
from experiments.transfer.backbones import BACKBONES, fill
from experiments.transfer.box_pictures import PANEL, STRIPE, beside_truth
from experiments.transfer.coco import CocoSplit, read_coco
from experiments.transfer.coco_batches import evaluation_requests, examples
from experiments.transfer.detection import DetectionConfig, DetectionRun, DetectionTask
from experiments.transfer.detectors import DETECTORS, DetectorSpec, body
from experiments.transfer.program import RECIPES, parse
from experiments.transfer.schedule import Schedule
from mtkd_env.errors import ConfigError
from processes import two_processes
from shapes_detection import TRAIN, VAL, edited, write_shapes

CPU = torch.device("cpu")
SIDE = 64
# Of the detectors that have regions of interest; fewer of them than torchvision's are faster.
FEW = {
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 5,
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 20,
}
MASKED = ("mask_rcnn",)


def few(name: str) -> dict[str, int]:
    return {} if name == "retinanet" else FEW


def make_detector(name: str, backbone: str, classes: int, **options: Any) -> nn.Module:
    return DetectorSpec(model=name, backbone=backbone, **options).build(classes)


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Each detector by its name, for small images."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"min_size": SIDE, "max_size": SIDE, "norm": "batch"}
    return request.param, make_detector(
        request.param, "resnet18", 4, arguments=few(request.param), **options
    )


def body_alone(name: str, **options: Any) -> nn.Module:
    """The body of a detector, with whatever the memory holds in its tensors."""
    with torch.device("meta"):
        found = body(make_detector(name, "resnet18", 4, **options))
    return found.to_empty(device="cpu")


def scenes(masks: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """An image with two objects, and a smaller one with none."""
    images = [torch.rand(3, SIDE, SIDE), torch.rand(3, SIDE // 2, SIDE)]
    targets = []
    for image, boxes in zip(images, ([[4, 4, 40, 40], [30, 40, 60, 60]], []), strict=True):
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.arange(1, len(boxes) + 1),
        }
        if masks:
            target["masks"] = torch.ones(len(boxes), *image.shape[1:], dtype=torch.uint8)
        targets.append(target)
    return images, targets


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=6, val=3, size=SIDE)


# --- Detectors.

# methods.md, section 5: with 91 classes, in millions.
COUNTS = {
    "faster_rcnn": (28.73, 38.83, 41.76),
    "mask_rcnn": (31.38, 41.48, 44.40),
    "retinanet": (21.04, 31.14, 34.01),
}


@pytest.mark.parametrize(
    ("name", "backbone", "millions"),
    [
        (name, backbone, count)
        for name, counts in COUNTS.items()
        for backbone, count in zip(BACKBONES, counts, strict=True)
    ],
)
def test_detectors_have_the_published_numbers_of_parameters(
    name: str, backbone: str, millions: float
) -> None:
    with torch.device("meta"):
        model = make_detector(name, backbone, 91)
    assert sum(one.numel() for one in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-3)


@pytest.mark.parametrize(
    ("backbone", "millions"), list(zip(BACKBONES, (21.05, 31.16, 34.07), strict=True))
)
def test_batch_norms_of_a_body_count_if_they_are_trained(backbone: str, millions: float) -> None:
    with torch.device("meta"):
        model = make_detector("retinanet", backbone, 91, norm="batch")
    assert sum(one.numel() for one in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-3)


def test_cascade_has_two_more_box_heads_than_faster_rcnn() -> None:
    with torch.device("meta"):
        single, cascade = (
            make_detector(n, "resnet18", 91) for n in ("faster_rcnn", "cascade_rcnn")
        )
    head = single.get_submodule("roi_heads")
    expected = sum(one.numel() for one in head.parameters())
    assert sum(one.numel() for one in cascade.get_submodule("roi_heads").parameters()) == (
        3 * expected
    )


@cache
def classifier(name: str) -> dict[str, Tensor]:
    """Tensors of a classifier without its last layer, none of them at its initial value."""
    state = get_model(name, weights=None).state_dict()
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if not name.startswith("fc.")
    }


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("name", DETECTORS)
def test_every_tensor_of_a_body_is_loaded(name: str, norm: str) -> None:
    exported = classifier("resnet18")
    part = body_alone(name, norm=norm)
    fill(part, exported)
    loaded = part.state_dict()
    counters = {name for name in exported if name.endswith("num_batches_tracked")}
    assert exported.keys() - loaded.keys() <= counters
    assert loaded.keys() <= exported.keys()
    assert all(loaded[key].equal(exported[key]) for key in loaded.keys() - counters)


def test_unfrozen_parts_of_a_body_and_all_of_the_rest_get_a_gradient(
    detector: tuple[str, nn.Module],
) -> None:
    name, model = detector
    sum(model.train()(*scenes(name in MASKED)).values(), torch.zeros(())).backward()
    frozen = ("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1")
    for key, parameter in model.named_parameters():
        if key.startswith(frozen):
            assert not parameter.requires_grad, key
            assert parameter.grad is None, key
        else:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("layers", "first"), [(0, None), (2, "layer3"), (5, "conv1")])
def test_as_many_parts_of_a_body_are_trained_as_asked_for(layers: int, first: str | None) -> None:
    with torch.device("meta"):
        parts = body(make_detector("faster_rcnn", "resnet18", 4, trainable_layers=layers))
    trained = [name for name, one in parts.named_parameters() if one.requires_grad]
    assert [name.split(".")[0] for name in trained[:1]] == ([first] if first else [])


def test_frozen_norms_keep_the_statistics_of_the_distilled_network() -> None:
    part = body_alone("faster_rcnn")
    fill(part, classifier("resnet18"))
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    norms = {name for name, one in part.named_modules() if isinstance(one, FrozenBatchNorm2d)}
    optimizer = SGD(part.parameters(), lr=1e-6, weight_decay=0.1)
    part.train()(torch.rand(1, 3, SIDE, SIDE))["3"].mean().backward()
    optimizer.step()
    kept = {name for name, tensor in part.state_dict().items() if tensor.equal(before[name])}
    assert len(norms) == 20
    assert {name.rpartition(".")[0] for name in kept} > norms
    assert len([name for name in kept if name.rpartition(".")[0] in norms]) == 4 * 20
    assert "layer4.1.conv2.weight" not in kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_finite_and_predictions_have_all_their_digits(
    detector: tuple[str, nn.Module], precision: str
) -> None:
    name, model = detector
    images, targets = scenes(name in MASKED)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        losses = model.train()(images, targets)
        found = model.eval()(images)
    assert all(loss.isfinite() for loss in losses.values())
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for one in found:
        assert one["boxes"].dtype == one["scores"].dtype == torch.float32
        assert ("masks" in one) == (name in MASKED)


def test_boxes_are_not_rounded_under_bfloat16(detector: tuple[str, nn.Module]) -> None:
    seen: list[Tensor] = []
    decode = BoxCoder.decode_single

    def spy(coder: BoxCoder, offsets: Tensor, boxes: Tensor) -> Tensor:
        seen.append(decode(coder, offsets, boxes))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(BoxCoder, "decode_single", spy)
        with torch.no_grad():
            detector[1].eval()(scenes(masks=False)[0])
    assert seen
    assert {boxes.dtype for boxes in seen} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet20"}, "unknown backbone 'resnet20'; did you mean 'resnet50'"),
        ({"norm": "batsh"}, "unknown norm 'batsh'; did you mean 'batch'"),
        ({"trainable_layers": 6}, "trainable_layers: expected 0 to 5, got 6"),
        ({"min_size": 0}, "min_size: expected 1 to 1333, got 0"),
        ({"max_size": 100}, "min_size: expected 1 to 100, got 800"),
        ({"arguments": {"box_score": 0.1}}, "key of arguments 'box_score'; did you mean 'box_s"),
        ({"arguments": {"min_size": 4}}, "unknown key of arguments 'min_size'"),
        ({"arguments": {"rpn_anchor_generator": 4}}, "arguments: rpn_anchor_generator should be"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")), torch.device("meta"):
        make_detector(**{"name": "faster_rcnn", "backbone": "resnet18", "classes": 4} | options)


# --- Judgement and pictures.


def truths(split: CocoSplit, *, masks: bool) -> list[dict[str, Tensor]]:
    return [split.truth(position, masks=masks) for position in range(len(split.images))]


def certain(truth: dict[str, Tensor], score: float = 0.9) -> dict[str, Tensor]:
    """A detection of everything there is."""
    found = {name: truth[name] for name in ("boxes", "labels")}
    found["scores"] = torch.full((len(truth["labels"]),), score)
    if "masks" in truth:
        found["masks"] = truth["masks"] > 0
    return found


@pytest.mark.parametrize("masks", [False, True])
def test_the_truth_has_a_precision_of_one(shapes: Path, masks: bool) -> None:
    judged = AveragePrecision(masks=masks)
    for truth in truths(read_coco(shapes, VAL), masks=masks):
        judged.add([certain(truth)], [truth])
    values = judged.values()
    assert next(iter(values)) == "box_map"
    assert ("mask_map" in values) == masks
    assert all(value == pytest.approx(1) for value in values.values())
    assert "box_map_large" not in values


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    with pytest.raises(ConfigError, match=r"needs torchmetrics; .*'mtkd-env\[detection\]'"):
        AveragePrecision(masks=False)


def test_nothing_found_has_a_precision_of_zero(shapes: Path) -> None:
    judged = AveragePrecision(masks=False)
    for truth in truths(read_coco(shapes, VAL), masks=False):
        nothing = {name: value[:0] for name, value in certain(truth).items()}
        judged.add([nothing], [truth])
    assert set(judged.values().values()) == {0.0}


def test_precision_counts_the_overlaps_that_are_reached() -> None:
    # 36 of 50 pixels are shared: an overlap of 0.72, which 5 of the 10 thresholds are below.
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 5]]), "labels": torch.tensor([1])}
    found = {**certain(truth), "boxes": torch.tensor([[0.0, 0, 7.2, 5]])}
    judged = AveragePrecision(masks=False)
    judged.add([found], [truth | {"iscrowd": torch.tensor([0]), "area": torch.tensor([50.0])}])
    values = judged.values()
    assert values["box_map"] == pytest.approx(0.5)
    assert (values["box_map_50"], values["box_map_75"]) == (1, 0)


def test_what_is_found_in_a_crowd_is_no_mistake() -> None:
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20.0, 20, 60, 60]]),
        "labels": torch.tensor([1, 1]),
        "iscrowd": torch.tensor([0, 1]),
        "area": torch.tensor([100.0, 1600.0]),
    }
    found = certain(truth)
    found["boxes"] = torch.tensor([[0.0, 0, 10, 10], [30.0, 30, 40, 40]])
    found["scores"] = torch.tensor([0.5, 0.9])
    for crowd, expected in ((1, 1.0), (0, 0.25)):
        judged = AveragePrecision(masks=False)
        judged.add([found], [truth | {"iscrowd": torch.tensor([0, crowd])}])
        assert judged.values()["box_map"] == pytest.approx(expected, abs=0.01)


def _share(root: str, number_of_found: int) -> dict[str, float]:
    from mtkd_env import distributed

    split = read_coco(Path(root), VAL)
    judged = AveragePrecision(masks=True)
    for asked in evaluation_requests(split, batch_size=1, shard=distributed.shard()):
        for _, truth in examples(asked, split, masks=True, truth=True):
            found = {name: value[:number_of_found] for name, value in certain(truth).items()}
            judged.add([found], [truth])
    return judged.values()


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_images_find_the_precision_of_one(
    shapes: Path, tmp_path: Path
) -> None:
    expected = _share(str(shapes), 1)
    assert 0 < expected["box_map"] < 1
    with two_processes(tmp_path) as pair:
        assert pair(_share, str(shapes), 1) == [expected, expected]


def test_pictures_show_what_is_found_beside_the_truth(shapes: Path) -> None:
    split = read_coco(shapes, VAL)
    image, truth = split.image(0), split.truth(0, masks=True)
    found = certain(truth)
    both = beside_truth(image, found, truth, split.class_names)
    assert both.shape == (3, PANEL, 2 * PANEL + STRIPE)
    assert both.dtype == torch.uint8
    unsure = beside_truth(image, certain(truth, score=0.4), truth, split.class_names)
    nothing = {name: value[:0] for name, value in truth.items()}
    plain = beside_truth(image, certain(nothing), nothing, split.class_names)
    assert unsure[..., -PANEL:].equal(both[..., -PANEL:])
    assert not unsure[..., :PANEL].equal(both[..., :PANEL])
    assert unsure[..., :PANEL].equal(plain[..., :PANEL])
    assert plain[..., :PANEL].equal(plain[..., -PANEL:])


# --- The program.


def arguments(root: Path, output: Path, model: str = "retinanet", *more: str) -> list[str]:
    flags = {
        "data": root,
        "output": output,
        "model": model,
        "train": TRAIN,
        "val": VAL,
        "min_size": SIDE,
        "max_size": SIDE,
        "batch_size": 3,
        "norm": "batch",
        "schedule.epochs": 1,
        "schedule.warmup_steps": 0,
        "schedule.lr": 0.001,
        "workers": 0,
        "device": "cpu",
    }
    return [*(f"--{name}={value}" for name, value in flags.items()), *more]


def test_a_run_trains_and_judges_and_draws(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    flags = arguments(shapes, output, "mask_rcnn", f"--arguments={FEW}")
    assert detection.main(flags) == 0
    shown = capsys.readouterr().out
    assert "begins with a random resnet18 (--weights would say" in shown
    result = json.loads((output / "result.json").read_text())
    assert next(iter(result["metrics"])) == "box_map"
    assert "mask_map" in result["metrics"]
    assert result["steps"] == 2
    assert (output / "predictions.png").stat().st_size > 1000
    assert {"loss/loss_mask", "loss/loss_classifier"} <= json.loads(
        (output / "metrics.jsonl").read_text().splitlines()[-1]
    ).keys()


def task(root: Path, **options: Any) -> DetectionTask:
    config = DetectionConfig(
        data=str(root),
        output="unused",
        train=TRAIN,
        val=VAL,
        min_size=SIDE,
        max_size=SIDE,
        norm="batch",
        workers=0,
        **{"model": "retinanet", "batch_size": 3} | options,
    )
    return DetectionTask(config, CPU)


def test_a_detector_begins_with_the_given_weights(shapes: Path, tmp_path: Path) -> None:
    path = tmp_path / "backbone.pt"
    torch.save(classifier("resnet18"), path)
    loaded = body(task(shapes, weights=str(path)).model).state_dict()
    expected = classifier("resnet18")
    assert all(loaded[name].equal(expected[name]) for name in loaded)
    torch.save(classifier("resnet34"), path)
    with pytest.raises(ConfigError, match="weights: not the backbone of this network"):
        task(shapes, weights=str(path))


def test_the_same_seed_makes_the_same_detector(shapes: Path) -> None:
    one, other, third = (task(shapes, seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert all(one[name].equal(other[name]) for name in one)
    assert not one["head.regression_head.conv.0.0.weight"].equal(
        third["head.regression_head.conv.0.0.weight"]
    )


def test_an_epoch_has_as_many_batches_as_it_says(shapes: Path) -> None:
    made = task(shapes)
    batches = list(made.batches(0))
    assert len(batches) == made.steps_per_epoch == 2
    images, targets = batches[0]
    assert len(images) == len(targets) == 3
    assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)


def test_an_epoch_may_begin_with_a_later_batch(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = task(shapes, batch_size=2)
    whole = list(made.batches(3))
    read: list[int] = []
    image = CocoSplit.image
    monkeypatch.setattr(CocoSplit, "image", lambda *call: read.append(call[1]) or image(*call))
    rest = list(made.batches(3, begin=1))
    assert len(whole) == 3
    assert len(read) == 2 * 2
    for (images, targets), (expected, truth) in zip(rest, whole[1:], strict=True):
        assert all(one.equal(other) for one, other in zip(images, expected, strict=True))
        for one, other in zip(targets, truth, strict=True):
            assert all(one[name].equal(other[name]) for name in other)


def test_evaluation_and_pictures_cover_what_they_are_asked_for(shapes: Path) -> None:
    made = task(shapes, batch_size=2)
    made.model.eval()
    metrics = made.evaluate()
    assert next(iter(metrics)) == "box_map"
    assert all(0 <= value <= 1 for value in metrics.values())
    assert [len(made.pictures(count)) for count in (1, 3, 9)] == [1, 3, 3]


def test_splits_of_other_categories_are_refused(tmp_path: Path) -> None:
    write_shapes(tmp_path, train=2, val=2, size=SIDE)
    edited(tmp_path, lambda content: content["categories"][0].update(name="ring"), VAL)
    with pytest.raises(ConfigError, match=r"val: expected the 3 categories of .*, found others"):
        task(tmp_path, batch_size=1)


@pytest.mark.parametrize(("split", "message"), [(TRAIN, "to learn from"), (VAL, "to find")])
def test_splits_without_objects_are_refused(tmp_path: Path, split: str, message: str) -> None:
    write_shapes(tmp_path, train=2, val=2, size=SIDE)
    edited(tmp_path, lambda content: content["annotations"].clear(), split)
    with pytest.raises(ConfigError, match=f"no image in .*{split}.json has an object {message}"):
        task(tmp_path, batch_size=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=mask_rcn"], "unknown detector 'mask_rcn'; did you mean 'mask_rcnn'"),
        (["--backbone=resnet19"], "unknown backbone 'resnet19'; did you mean 'resnet"),
        (["--train=train2018"], "instances_train2018.json; looked in"),
    ],
)
def test_wrong_flags_end_the_program_with_a_line(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert detection.main(arguments(shapes, tmp_path / "run", "retinanet", *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("recipe", "model", "lr"),
    [("coco_2x", "mask_rcnn", 0.01), ("coco_2x_retinanet", "retinanet", 0.005)],
)
def test_recipes_are_those_of_the_paper(recipe: str, model: str, lr: float) -> None:
    flags = ["--recipe", recipe, "--data", "coco", "--output", "run"]
    config, resume = parse(DetectionConfig, flags, "mtkd transfer detection")
    assert not resume
    assert config.model == model
    assert config.batch_size == 8
    assert (config.min_size, config.max_size) == (800, 1333)
    assert (config.trainable_layers, config.norm) == (3, "frozen")
    assert config.schedule == Schedule(
        lr=lr, momentum=0.9, weight_decay=1e-4, milestones=(16, 22), warmup_steps=500, epochs=24
    )
    # 117,266 images of train2017 have objects on them; the rate after the warm-up, and its falls.
    steps = 117_266 // 8
    rates = [
        lr * config.schedule.recipe(steps).share(float(epoch * steps))
        for epoch in (0.05, 15.9, 16, 22, 23.9)
    ]
    assert rates == pytest.approx([lr, lr, lr / 10, lr / 100, lr / 100])


def test_all_recipes_of_detection_are_tested() -> None:
    assert {path.stem for path in RECIPES.glob("coco_2x*.yaml")} == {"coco_2x", "coco_2x_retinanet"}


# --- Learning.


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_train_and_predict_on_a_gpu(
    shapes: Path, name: str, precision: torch.dtype
) -> None:
    device = torch.device("cuda")
    config = DetectionConfig(
        data=str(shapes), output="unused", model=name, train=TRAIN, val=VAL, workers=1, batch_size=2
    )
    made = DetectionTask(config, device)
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        losses = made.losses(next(made.batches(0)))
        sum(losses.values(), torch.zeros((), device=device)).backward()
        made.model.eval()
        assert all(loss.isfinite() for loss in losses.values())
        assert math.isfinite(made.evaluate()["box_map"])


# Learning rate, epochs and the one after which the rate falls; RetinaNet is slower to begin.
LEARNING = {
    "faster_rcnn": (0.02, 6, 4),
    "mask_rcnn": (0.02, 5, 4),
    "retinanet": (0.01, 10, 7),
    "cascade_rcnn": (0.02, 5, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_each_detector_learns_shapes(name: str, tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "shapes")
    lr, epochs, milestone = LEARNING[name]
    regions = {"rpn_post_nms_top_n_train": 300, "rpn_post_nms_top_n_test": 100}
    # Four convolutions for every region with an object, or three heads, are dear.
    dear = name in ("mask_rcnn", "cascade_rcnn")
    trained_on = {"box_batch_size_per_image": 16 if dear else 64}
    cheap = trained_on | regions | {"box_detections_per_img": 20}
    config = DetectionConfig(
        data=str(root),
        output="unused",
        model=name,
        train=TRAIN,
        val=VAL,
        min_size=96,
        max_size=96,
        trainable_layers=5,
        norm="batch",
        arguments={} if name == "retinanet" else cheap,
        batch_size=4,
        schedule=Schedule(
            lr=lr, milestones=(milestone,), warmup_steps=50, epochs=epochs, clip=10.0
        ),
        evaluate_every=0,
        workers=0,
        device="cpu",
    )
    untrained = DetectionTask(config, CPU)
    untrained.model.eval()
    before = untrained.evaluate()
    started = time.process_time()
    after = DetectionRun(config).complete(tmp_path / "run").metrics
    steps, seconds = epochs * untrained.steps_per_epoch, time.process_time() - started
    sys.stdout.write(f"{name}: {steps} steps, {seconds:.0f} s of CPU: {before} to {after}\n")
    for kind in ("box_map", "mask_map") if name in MASKED else ("box_map",):
        assert before[kind] < 0.05
        assert after[kind] > 0.3
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss/total"] for row in rows]
    assert losses[-1] < losses[0] / 2
