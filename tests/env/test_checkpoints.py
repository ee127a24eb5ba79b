"""Checkpoints as other programs write them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mtkd_env.errors import ConfigError
from mtkd_env.networks import Network, build_network
from mtkd_env.teachers import PoolSpec, TeacherSpec, build_pool
from mtkd_env.teachers.weights import load_given
from tiny import CLASSES, perturb, seldom, training_set

State = Mapping[str, Any]


def small(seed: int = 0) -> Network:
    network = build_network("resnet8", num_classes=CLASSES, in_channels=1, width=0.125, seed=seed)
    return perturb(network, seed)


def prefixed(state: State, prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def load(path: Path, content: object, **kwargs: Any) -> tuple[Network, float | None]:
    torch.save(content, path / "given.pt")
    network = small(seed=1)
    return network, load_given(network, "resnet8", str(path / "given.pt"), **kwargs)


def assert_equal(network: Network, expected: State) -> None:
    found = network.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


STATE = small().state_dict()
OTHER = small(seed=2).state_dict()
ABOUT = {"epoch": 240, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}

LAYOUTS: dict[str, State] = {
    "plain": STATE,
    **{
        key: {**ABOUT, key: STATE}
        for key in ("network", "state_dict", "model", "net", "model_state_dict", "weights")
    },
    "nested keys": {"state_dict": {"model": STATE}},
    **{
        prefix: {**ABOUT, "model": prefixed(STATE, prefix)}
        for prefix in ("module.", "model.", "student.", "_orig_mod.", "module._orig_mod.net.")
    },
    "beside a loss": {
        **ABOUT,
        "state_dict": {**prefixed(STATE, "model."), "criterion.weight": torch.ones(3)},
    },
    "without counters": {name: one for name, one in STATE.items() if "num_batches" not in name},
    "beside an average": {"state_dict": STATE, "state_dict_ema": OTHER},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_wherever_a_program_has_put_them(tmp_path: Path, layout: str) -> None:
    network, _ = load(tmp_path, LAYOUTS[layout])
    expected = {
        name: torch.zeros_like(one) if "num_batches" in name else one for name, one in STATE.items()
    }
    assert_equal(network, expected)


@pytest.mark.parametrize("chosen", [None, "model"])
def test_a_loss_with_a_state_is_left_out_where_the_network_is_a_librarys(
    tmp_path: Path, chosen: str | None
) -> None:
    pytest.importorskip("timm")
    name = "timm:mobilenetv3_small_050"
    make = partial(build_network, name, num_classes=CLASSES, in_channels=3, width=1)
    given, network = make(seed=1), make(seed=2)
    state = prefixed(given.library_state(given.state_dict()), "model.")
    content = {"state_dict": {**state, "criterion.weight": torch.ones(3)}}
    torch.save(content, tmp_path / "given.pt")
    load_given(network, name, str(tmp_path / "given.pt"), chosen)
    assert_equal(network, given.state_dict())


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_the_moving_average_is_taken_if_it_is_asked_for(tmp_path: Path, key: str) -> None:
    averaged = AveragedModel(small()).state_dict()
    assert "n_averaged" in averaged
    network, _ = load(tmp_path, {"model": OTHER, key: averaged}, chosen="ema")
    assert_equal(network, STATE)


@pytest.mark.parametrize("chosen", ["student", "teacher"])
def test_one_of_several_networks_in_a_file_is_taken_by_its_name(
    tmp_path: Path, chosen: str
) -> None:
    both = {**prefixed(STATE, "module.student."), **prefixed(OTHER, "module.teacher.")}
    network, _ = load(tmp_path, {"model": both}, chosen=chosen)
    assert_equal(network, STATE if chosen == "student" else OTHER)
    with pytest.raises(
        ConfigError, match=r"several that fit; expected one of model\.module\.student, model\.mod"
    ):
        load(tmp_path, {"model": both})


@pytest.mark.parametrize("chosen", ["ema", "student"])
def test_weights_that_a_file_does_not_have_are_named_with_what_it_has(
    tmp_path: Path, chosen: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"given\.pt holds no '{chosen}'; it has epoch, optimizer, model$"
    ):
        load(tmp_path, {**ABOUT, "model": STATE}, chosen=chosen)


def test_names_that_do_not_fit_are_shown_beside_those_that_are_expected(tmp_path: Path) -> None:
    theirs = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    torch.save({"model": theirs.state_dict()}, tmp_path / "given.pt")
    spec = TeacherSpec("resnet8", name="north", checkpoint=str(tmp_path / "given.pt"), width=0.125)
    message = (
        r"^teachers\.north: .*given\.pt lacks the tensor 'stem\.0\.weight' and 46 more: expected "
        r"stem\.0\.weight, stem\.1\.weight, stem\.1\.bias, stem\.1\.running_mean, "
        r"stem\.1\.running_var; it has under 'model' "
        r"0\.weight, 0\.bias, 1\.weight, 1\.bias, 2\.weight$"
    )
    with pytest.raises(ConfigError, match=message):
        build_pool(PoolSpec((spec,)), training_set(), cache=tmp_path)


def test_a_text_in_place_of_weights_is_named_with_its_teacher(tmp_path: Path) -> None:
    (tmp_path / "given.pt").write_text("the weights are in the other folder\n")
    spec = TeacherSpec("resnet8", name="north", checkpoint=str(tmp_path / "given.pt"))
    with pytest.raises(ConfigError, match=r"^teachers\.north: .*given\.pt: .* but a text file"):
        build_pool(PoolSpec((spec,)), training_set(), cache=tmp_path)


def test_weights_come_with_a_checkpoint_that_is_a_file() -> None:
    with pytest.raises(ConfigError, match="weights: expected with a checkpoint"):
        TeacherSpec("resnet8", weights="ema")
    with pytest.raises(ConfigError, match="weights: expected a file as checkpoint, got gone"):
        load_given(small(), "resnet8", "gone", "ema")


@pytest.mark.parametrize(
    ("about", "stated"),
    [
        ({"accuracy": torch.tensor(79.42)}, 0.7942),
        ({"best_acc": 0.5}, 0.5),
        ({"acc": "high"}, None),
    ],
)
def test_the_accuracy_that_a_file_states_is_a_share(
    tmp_path: Path, about: State, stated: float | None
) -> None:
    _, found = load(tmp_path, {**about, "model": STATE})
    assert found == (stated if stated is None else pytest.approx(stated))


# The layers of published CIFAR networks, in the order in which their authors define them.

BLOCK = ("conv1", "bn1", "conv2", "bn2")
BOTTLENECK = (*BLOCK, "conv3", "bn3")


def residual(blocks: int, wide_stem: bool = False) -> list[str]:
    layers = ["conv1", "bn1"]
    for stage in range(3):
        for block in range(blocks):
            here = f"layer{stage + 1}.{block}"
            layers += [f"{here}.{layer}" for layer in BLOCK]
            if block == 0 and (stage or wide_stem):
                layers += [f"{here}.downsample.0", f"{here}.downsample.1"]
    return [*layers, "fc"]


def residual_50() -> list[str]:
    layers = ["conv1", "bn1"]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            names = [*BOTTLENECK, *(() if block else ("shortcut.0", "shortcut.1"))]
            layers += [f"layer{stage}.{block}.{name}" for name in names]
    return [*layers, "linear"]


def wide(blocks: int, widen: int) -> list[str]:
    layers = ["conv1"]
    for stage in range(3):
        for block in range(blocks):
            names = ["bn1", "conv1", "bn2", "conv2"]
            names += ["convShortcut"] if block == 0 and (stage or widen > 1) else []
            layers += [f"block{stage + 1}.layer.{block}.{name}" for name in names]
    return [*layers, "bn1", "fc"]


def vgg(*repeats: int) -> list[str]:
    layers = [
        f"block{stage}.{3 * place + layer}"
        for stage, count in enumerate(repeats)
        for place in range(count)
        for layer in range(2)
    ]
    return [*layers, "classifier"]


def mobile() -> list[str]:
    layers = ["conv1.0", "conv1.1"]
    for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for block in range(blocks):
            layers += [f"blocks.{stage}.{block}.conv.{layer}" for layer in (0, 1, 3, 4, 6, 7)]
    return [*layers, "conv2.0", "conv2.1", "classifier.0"]


def shuffle(first: int, *end: str) -> list[str]:
    """Units of V1 have three convolutions each, the first of a stage of V2 five."""
    layers = ["conv1", "bn1"]
    for stage, units in enumerate((4, 8, 4), start=1):
        for unit in range(units):
            for number in range(1, 1 + (3 if unit else first)):
                layers += [f"layer{stage}.{unit}.{kind}{number}" for kind in ("conv", "bn")]
    return [*layers, *end, "linear"]


PUBLISHED: dict[str, tuple[str, float, list[str]]] = {
    **{
        f"resnet{depth}": (f"resnet{depth}", 1, residual((depth - 2) // 6))
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "resnet8x4": ("resnet8x4", 1, residual(1, wide_stem=True)),
    "resnet32x4": ("resnet32x4", 1, residual(5, wide_stem=True)),
    "ResNet50": ("cifar_resnet50", 1, residual_50()),
    **{
        f"wrn_{depth}_{widen}": (f"wrn_{depth}_{widen}", 1, wide((depth - 4) // 6, widen))
        for depth, widen in ((16, 1), (16, 2), (40, 1), (40, 2))
    },
    "vgg8": ("vgg8", 1, vgg(1, 1, 1, 1, 1)),
    "vgg11": ("vgg11", 1, vgg(1, 1, 2, 2, 2)),
    "vgg13": ("vgg13", 1, vgg(2, 2, 2, 2, 2)),
    "vgg16": ("vgg16", 1, vgg(2, 2, 3, 3, 3)),
    "vgg19": ("vgg19", 1, vgg(2, 2, 4, 4, 4)),
    "MobileNetV2": ("mobilenetv2", 0.5, mobile()),
    "ShuffleV1": ("shufflenetv1", 1, shuffle(3)),
    "ShuffleV2": ("shufflenetv2", 1, shuffle(5, "conv2", "bn2")),
}


# One of every kind of names.
KINDS = {"resnet8", "resnet8x4", "ResNet50", "wrn_16_1", "vgg8", "MobileNetV2"}
KINDS |= {"ShuffleV1", "ShuffleV2"}


@pytest.mark.parametrize("published", seldom(PUBLISHED, KINDS))
def test_published_cifar_checkpoints_load(tmp_path: Path, published: str) -> None:
    name, width, layers = PUBLISHED[published]
    given = build_network(name, num_classes=5, width=width, seed=3)
    own = [
        layer
        for layer, module in given.named_modules()
        if dict(module.named_parameters(recurse=False))
    ]
    assert len(own) == len(layers)
    called = dict(zip(own, layers, strict=True))
    state: dict[str, Tensor] = {}
    for tensor_name, tensor in given.state_dict().items():
        layer, _, kind = tensor_name.rpartition(".")
        state[f"{called[layer]}.{kind}"] = tensor
    torch.save({"epoch": 240, "model": state, "accuracy": torch.tensor(72.5)}, tmp_path / "ckpt")
    network = build_network(name, num_classes=5, width=width, seed=4)
    assert load_given(network, name, str(tmp_path / "ckpt")) == pytest.approx(0.725)
    assert_equal(network, given.state_dict())
