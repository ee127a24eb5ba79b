"""Networks of torchvision and of the user; those of timm are in test_networks_timm.py."""

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.models import WeightsEnum

from mtkd_env.errors import ConfigError
from mtkd_env.files import save_checkpoint
from mtkd_env.networks import Network, build_network, find_network
from mtkd_env.networks.cut import last_map_node, trace
from mtkd_env.networks.foreign import CHANNELS_LAST, tokens
from mtkd_env.networks.hooked import HookedNetwork
from mtkd_env.registration import make_env
from mtkd_env.teachers import PoolSpec, TeacherEnsemble, TeacherSpec, build_pool
from mtkd_env.testing import rollout
from tiny import CLASSES, IMAGE_SHAPE, batch, perturb, snapshot, training_set
from users_networks import Deciding, Own, Plain


class Known(NamedTuple):
    """A network for 1000 classes of 224x224 images."""

    parameters: int
    macs: float  # multiply-adds of convolutions and linear layers [10⁹]
    channels: int


# Tables 2 and 3 of Yang et al. (2025); torchvision's own numbers to the last parameter.
IMAGENET = {
    "resnet18": Known(11_689_512, 1.814, 512),
    "resnet34": Known(21_797_672, 3.664, 512),
    "resnet50": Known(25_557_032, 4.089, 2048),
    "resnet101": Known(44_549_160, 7.801, 2048),
    "wide_resnet50_2": Known(68_883_240, 11.398, 2048),
    "resnext50_32x4d": Known(25_028_904, 4.230, 2048),
}
PLAIN = "users_networks:Plain@body"
TRANSFORMER = "users_networks:SmallTransformer@encoder"


def images(side: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def transformer() -> Network:
    return build_network(TRANSFORMER, num_classes=CLASSES, image_size=(16, 16), seed=0).eval()


def plain(**kwargs: Any) -> Network:
    return build_network(PLAIN, num_classes=CLASSES, seed=0, **kwargs)


# torchvision's.


@pytest.mark.parametrize("model", IMAGENET)
def test_imagenet_network_has_the_known_parameters_multiply_adds_and_shapes(model: str) -> None:
    with torch.device("meta"):
        network = build_network(f"torchvision:{model}", num_classes=1000).eval()
    known, macs = IMAGENET[model], 0

    def count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * layer.weight.numel() // layer.weight.shape[0]

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    output = network(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in network.parameters()) == known.parameters
    assert macs / 1e9 == pytest.approx(known.macs, abs=5e-4)
    assert output.feature.shape == (1, known.channels)
    assert output.feature_map.shape == (1, known.channels, 7, 7)
    assert (network.feature_dim, network.map_channels) == (known.channels, known.channels)


# One whose feature is the pooled map, and one with a layer between the two and a signed map.
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_a_model_of_torchvision_gives_its_own_logits(model: str) -> None:
    theirs = torchvision.models.get_model(model, num_classes=CLASSES)
    network = build_network(f"torchvision:{model}", num_classes=CLASSES, seed=0)
    network.load_state_dict(network.native_state(theirs.state_dict()))
    for module in (theirs.eval(), network.eval()):
        perturb(module, seed=3)
    output = network(images())
    assert torch.equal(output.logits, theirs(images()))
    assert torch.equal(network.head(network.features(images())).logits, output.logits)
    assert output.feature.shape == (2, network.feature_dim)
    assert output.feature_map.shape == (2, network.map_channels, 1, 1)
    assert network.signed_map == (model != "resnet18") == bool((output.feature_map < 0).any())


@pytest.mark.parametrize(
    ("model", "node"),
    [
        ("resnet18", "layer4_1"),
        ("shufflenet_v2_x0_5", "conv5_2"),
        ("densenet121", "relu"),
        ("vgg11", "avgpool"),
        ("swin_t", "permute"),
        ("vit_b_32", "encoder"),
    ],
)
def test_the_map_is_what_the_last_pooling_takes(model: str, node: str) -> None:
    with torch.device("meta"):
        traced = trace(torchvision.models.get_model(model), model)
    assert last_map_node(traced, (3, 224, 224), model) == node


def test_images_of_another_number_of_channels_get_a_new_first_convolution() -> None:
    network = build_network("torchvision:resnet18", num_classes=CLASSES, in_channels=1)
    assert network(images(channels=1)).logits.shape == (2, CLASSES)
    first = network.get_submodule("body.conv1")
    assert first.weight.shape == (64, 1, 7, 7)
    assert (first.stride, first.padding, first.bias) == ((2, 2), (3, 3), None)


def test_arguments_of_torchvision_reach_it() -> None:
    with torch.device("meta"):
        name, arguments = "torchvision:resnet18", {"zero_init_residual": True}
        assert build_network(name, num_classes=3, **arguments).num_classes == 3
        with pytest.raises(ConfigError, match=r"'torchvision:resnet18': .*'zero_init'"):
            build_network(name, num_classes=3, zero_init=True)


# Vision transformers.


def test_the_map_of_a_transformer_is_its_patches_and_the_feature_its_class_token() -> None:
    network = transformer()
    output = network(images(16))
    tokens = network.get_submodule("body")(images(16))[0]
    assert tokens.shape == (2, 17, 8)
    assert torch.equal(output.feature, tokens[:, 0])
    for row in range(4):
        for column in range(4):
            assert torch.equal(
                output.feature_map[:, :, row, column], tokens[:, 1 + 4 * row + column]
            )
    assert (network.feature_dim, network.map_channels) == (8, 8)
    assert network.signed_map


def test_the_head_of_a_transformer_takes_the_mean_of_the_patches_for_the_class_token() -> None:
    network = transformer()
    output = network(images(16))
    logits = functional.linear(
        output.feature_map.mean(dim=(2, 3)),
        network.get_parameter("neck.heads.head.weight"),
        network.get_parameter("neck.heads.head.bias"),
    )
    torch.testing.assert_close(network.head(output.feature_map).logits, logits)


def test_patches_that_are_no_square_are_refused() -> None:
    assert tokens(16).to_map(torch.zeros(2, 16, 3)).shape == (2, 3, 4, 4)
    with pytest.raises(ConfigError, match="15 patches are not a square"):
        tokens(16, prefix=1)


@pytest.mark.parametrize("layout", [tokens(9, prefix=0), CHANNELS_LAST])
def test_a_map_comes_back_from_its_layout(layout: Any) -> None:
    feature_map = torch.randn(2, 5, 3, 3)
    assert torch.equal(layout.to_map(layout.from_map(feature_map)), feature_map)


# The user's own.


def test_a_network_of_the_user_comes_in_by_its_name() -> None:
    network = build_network("users_networks:Own", num_classes=CLASSES, in_channels=1)
    assert type(network) is Own
    assert network.num_classes == CLASSES


def test_a_classifier_of_the_user_is_cut_at_the_named_layer() -> None:
    network = plain().eval()
    theirs = Plain(CLASSES).eval()
    theirs.load_state_dict({k.partition(".")[2]: v for k, v in network.state_dict().items()})
    output = network(images())
    assert torch.equal(output.logits, theirs(images()))
    assert torch.equal(output.feature_map, theirs.body(theirs.stem(images())))
    assert torch.equal(output.feature, output.feature_map.mean(dim=(2, 3)))
    assert (network.feature_dim, network.map_channels) == (12, 12)
    assert network.signed_map
    unsigned = build_network("users_networks:Plain@stem", num_classes=CLASSES)
    assert (unsigned.feature_dim, unsigned.map_channels) == (12, 8)
    assert not unsigned.signed_map


# By class, where the logits are in what it gives.
HOOKED: dict[str, Callable[[Any], Tensor]] = {
    "ControlFlow": lambda given: given,
    "InTraining": lambda given: given,
    "Flags": lambda given: given,
    "Attribute": lambda given: given.logits,
    "Dictionary": lambda given: given["out"],
    "Tuple": lambda given: given[1],
}


@pytest.mark.parametrize("name", HOOKED)
def test_a_classifier_that_cannot_be_traced_is_seen_through_hooks(name: str) -> None:
    network = build_network(f"users_networks:{name}@body", num_classes=CLASSES, seed=0)
    assert isinstance(network, HookedNetwork)
    perturb(network, seed=2)
    model, inputs = network.model, images(4)
    output = network(inputs)
    assert torch.equal(output.logits, HOOKED[name](model(inputs)))
    assert torch.equal(model.classifier(output.feature), output.logits)
    assert torch.equal(output.feature, output.feature_map.mean(dim=(2, 3)))
    again = network.head(output.feature_map)
    torch.testing.assert_close(again.logits, output.logits)
    assert torch.equal(again.feature_map, output.feature_map)
    ensemble = TeacherEnsemble([network.train()], ["a"])
    known = ensemble(inputs)
    torch.testing.assert_close(known.logits[0], output.logits)
    torch.testing.assert_close(known.feature_maps[0], output.feature_map)
    torch.testing.assert_close(ensemble.classify([output.feature_map])[0], output.logits)


def test_a_student_seen_through_hooks_learns() -> None:
    network = build_network("users_networks:Flags@body", num_classes=CLASSES, seed=0)
    copied = deepcopy(network)
    output = copied(images(4))
    assert output.feature_map.grad_fn is not None
    output.logits.sum().backward()
    assert all(one.grad is not None for one in copied.parameters())
    assert all(one.grad is None for one in network.parameters())


def test_the_parts_of_a_classifier_train_and_evaluate_as_they_did_before() -> None:
    network = plain()
    assert network.training
    assert not torch.equal(network(images()).logits, network(images()).logits)  # dropout
    network.eval()
    assert torch.equal(network(images()).logits, network(images()).logits)


def test_a_user_decides_what_the_class_is_called_with() -> None:
    assert plain(width=4.0, in_channels=1).get_submodule("body.stem.0").weight.shape[:2] == (4, 1)
    assert plain().get_submodule("body.stem.0").out_channels == 8  # its own default
    ten = build_network("users_networks:TenClasses@body", num_classes=10, in_channels=1)
    assert ten.num_classes == 10
    with pytest.raises(ConfigError, match=r"'users_networks:TenClasses@body' has 10 classes"):
        build_network("users_networks:TenClasses@body", num_classes=4, in_channels=1)


# Names that cannot be used.


UNKNOWN = {
    "resnet9": r"unknown student 'resnet9'; did you mean 'resnet\d+x?\d?'\? \(known: cifar_",
    "resnet50": "unknown student 'resnet50'; did you mean 'torchvision:resnet50'",
    "torchvision:resnt50": "unknown network .*; did you mean 'torchvision:resnet50'",
    "torchvision:resnet50.IMAGENET1K_V1": "'IMAGENET1K_V1' may be the checkpoint of a teacher",
    "torchvison:resnet50": "No module named 'torchvison'; did you mean 'torchvision'",
    "users_networks:Plan@body": "cannot load 'users_networks:Plan': module .* has no attribute",
    "no_networks:Plain": "cannot load 'no_networks:Plain': .*is its folder in PYTHONPATH",
    ":Plain": "cannot load ':Plain': expected module:Name",
    "users_networks:CONSTANT": "'users_networks:CONSTANT' is not a class of nn.Module or .* but 3",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_name_without_a_network_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=UNKNOWN[name]):
        find_network(name, "student")


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "width": (
        "torchvision:resnet18",
        {"width": 0.5},
        r"has a fixed width, expected 1, found 0\.5; .*--student\.width$",
    ),
    "own width": ("users_networks:Own", {"width": 0.5}, "'users_networks:Own' has a fixed width"),
    "argument": (PLAIN, {"widths": 4}, r"body\.widths: unknown key; did you mean 'width'"),
    "image size": (TRANSFORMER, {"image_size": (8, 8)}, "encoder' cannot take images of 3x8x8: "),
    "no layer": (
        "users_networks:Plain",
        {},
        r"behind an @, or by .*cut_at \(outermost: stem, body, unused",
    ),
    "layer": ("users_networks:Plain@bodi", {}, "no layer 'bodi'; did you mean 'body'"),
    "unused": ("users_networks:Plain@unused", {}, "never calls the layer 'unused'"),
    "vector": ("users_networks:Plain@dropout", {}, r"gives \(1, 12\), neither a map nor tokens"),
    "layer of ours": ("users_networks:Own@body", {}, "knows its feature layer; drop '@body'"),
    "two logits": (
        "users_networks:TwoLogits@body",
        {},
        rf"the only part of shape \(B, {CLASSES}\), its forward gives a tuple of 0: \(B, 4\), 1: .*"
        r"a subclass of mtkd_env\.networks\.Network",
    ),
    "shortcut": ("users_networks:PastTheMap@body", {}, "depend on more than the feature layer"),
    "end": ("users_networks:NoLinearEnd@body", {}, "expected logits from an nn.Linear at its end"),
    "no module": ("users_networks:number", {}, "gives a int, expected an nn.Module"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_network_that_cannot_be_made_says_why(case: str) -> None:
    name, arguments, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        build_network(name, num_classes=CLASSES, **arguments)


def test_networks_of_timm_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigError, match=r"needs timm; install it with pip install 'mtkd-env\[timm"
    ):
        find_network("timm:deit_tiny_patch16_224")


# In their roles.


@pytest.mark.parametrize("make", [transformer, lambda: perturb(plain(), seed=1)])
def test_the_ensemble_folds_foreign_networks(make: Any) -> None:
    network = make().double()
    inputs = images(16).double()
    expected = network(inputs)
    ensemble = TeacherEnsemble([network], ["a"])
    known = ensemble(inputs)
    assert isinstance(ensemble.networks[0], fx.GraphModule)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in ensemble.modules())
    torch.testing.assert_close(known.logits[0], expected.logits)
    torch.testing.assert_close(known.features[0], expected.feature)
    torch.testing.assert_close(known.feature_maps[0], expected.feature_map)
    head = network.head(expected.feature_map).logits
    torch.testing.assert_close(ensemble.classify([expected.feature_map])[0], head)


def test_the_ensemble_keeps_a_network_that_cannot_be_followed_as_it_is() -> None:
    network = Deciding(CLASSES)
    ensemble = TeacherEnsemble([network], ["a"])
    assert isinstance(ensemble.networks[0], Deciding)
    assert ensemble.networks[0] is not network
    for inputs in (batch().inputs.abs(), -batch().inputs.abs()):
        known = ensemble(inputs)
        torch.testing.assert_close(known.logits[0], network(inputs).logits)
        torch.testing.assert_close(ensemble.classify(known.feature_maps), known.logits)


def test_foreign_networks_teach_and_learn_in_an_environment() -> None:
    env = make_env(
        num_envs=8,
        teachers=[
            {"network": PLAIN, "kind": "random"},
            {"network": "users_networks:Own", "kind": "random"},
        ],
        student=PLAIN,
        width=1.0,
        reward_timing="after",  # sees the student again, with copies of its buffers
    )
    env.reset(seed=0)
    assert env.teacher_names == (f"{PLAIN}-random", "users_networks:Own-random")
    before = snapshot(env.distiller.student)
    rollout(env, 2)
    after = env.distiller.student.state_dict()
    assert all(not after[k].equal(v) for k, v in before.items() if k.endswith("weight"))


def test_seed_decides_the_initialisation_of_a_foreign_network() -> None:
    first, same = plain(), plain()
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True)
    )
    state = torch.get_rng_state()
    build_network(PLAIN, num_classes=CLASSES, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


# Checkpoints.


def pool_of(checkpoint: str, network: str = "torchvision:resnet18") -> PoolSpec:
    return PoolSpec((TeacherSpec(network, name="good", checkpoint=checkpoint),))


def theirs() -> nn.Module:
    """A classifier as its library has it, for the images of `tiny`."""
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(IMAGE_SHAPE[0], 64, 7, 2, padding=3, bias=False)
    return perturb(model, seed=7)


def test_a_state_dict_of_torchvision_is_a_teacher(tmp_path: Path) -> None:
    model = theirs()
    # Files of old have no counters.
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_checkpoint(tmp_path / "mine.pt", state)
    pool = build_pool(pool_of(str(tmp_path / "mine.pt")), training_set(), cache=tmp_path)
    found = pool.ensemble(batch().inputs).logits[0]
    torch.testing.assert_close(found, model(batch().inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["network", "state_dict", "model"])
@pytest.mark.parametrize("names", ["its own", "those here"])
def test_a_network_of_the_user_has_checkpoints(tmp_path: Path, key: str, names: str) -> None:
    model = perturb(Plain(CLASSES, in_channels=1), seed=4)
    network = build_network(PLAIN, num_classes=CLASSES, in_channels=1)
    network.load_state_dict(network.native_state(model.state_dict()))
    state = (model if names == "its own" else network).state_dict()
    save_checkpoint(tmp_path / "mine.pt", {key: state})
    pool = build_pool(pool_of(str(tmp_path / "mine.pt"), PLAIN), training_set(), cache=tmp_path)
    found = pool.ensemble(batch().inputs).logits[0]
    torch.testing.assert_close(found, model(batch().inputs), rtol=1e-4, atol=1e-4)


def test_published_weights_are_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = perturb(torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES), seed=7), []

    def get_state_dict(self: WeightsEnum, **kwargs: bool) -> Any:
        asked.append((str(self), kwargs))
        return model.state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    pool = build_pool(
        pool_of("IMAGENET1K_V1", "torchvision:shufflenet_v2_x0_5"), training_set(), cache=tmp_path
    )
    assert asked == [
        ("ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", {"progress": True, "check_hash": True})
    ]
    # It sees images like those that it was trained on.
    (images,) = pool.ensemble.images(batch().inputs)
    assert images.shape[1:] == (3, 224, 224)
    found = pool.ensemble(batch().inputs).logits[0]
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)
    assert len(pool.digests["good"]) == 64


def test_weights_of_another_number_of_classes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torchvision.models.resnet18()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: model.state_dict())
    message = r"^teachers\.good: IMAGENET1K_V1 has 'neck\.fc\.weight' of shape \(1000, 512\)"
    with pytest.raises(ConfigError, match=message):
        build_pool(pool_of("IMAGENET1K_V1"), training_set(), cache=tmp_path)


def test_weights_that_are_not_published_are_named_with_those_that_are(tmp_path: Path) -> None:
    message = r"^teachers\.good: IMAGENET1K_V9: no such checkpoint .*resnet18': IMAGENET1K_V1\)$"
    with pytest.raises(ConfigError, match=message):
        build_pool(pool_of("IMAGENET1K_V9"), training_set(), cache=tmp_path)


def test_weights_that_cannot_be_downloaded_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(ConfigError, match=r"IMAGENET1K_V1: cannot download it: .*no route to host"):
        build_pool(pool_of("IMAGENET1K_V1"), training_set(), cache=tmp_path)
