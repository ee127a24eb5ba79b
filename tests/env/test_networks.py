from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mtkd_env.errors import ConfigError
from mtkd_env.networks import NETWORKS, Network, build_network, check_network_arguments
from mtkd_env.networks.base import strides_safely, subsample
from mtkd_env.networks.resnet import ResNet
from mtkd_env.networks.wide_resnet import WideResNet
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.types import NetworkOutput
from tiny import perturb, seldom


class Known(NamedTuple):
    """A network for 100 classes of 32x32 images with 3 channels."""

    parameters: int
    macs: float  # multiply-adds of convolutions and linear layers [10⁶]
    feature_dim: int
    feature_map: tuple[int, int, int]


# To the precision of Table 1 of Yang et al. (2025) where that has the network.
KNOWN = {
    "cnn3": Known(30_196, 0.707, 64, (64, 4, 4)),
    "resnet8": Known(83_892, 12.507, 64, (64, 8, 8)),
    "resnet14": Known(181_108, 26.663, 64, (64, 8, 8)),
    "resnet20": Known(278_324, 40.819, 64, (64, 8, 8)),
    "resnet32": Known(472_756, 69.130, 64, (64, 8, 8)),
    "resnet44": Known(667_188, 97.442, 64, (64, 8, 8)),
    "resnet56": Known(861_620, 125.754, 64, (64, 8, 8)),
    "resnet110": Known(1_736_564, 253.156, 64, (64, 8, 8)),
    "resnet8x4": Known(1_233_540, 177.071, 256, (256, 8, 8)),
    "resnet20x4": Known(4_333_700, 630.056, 256, (256, 8, 8)),
    "resnet32x4": Known(7_433_860, 1083.041, 256, (256, 8, 8)),
    "resnet110x2": Known(6_911_220, 1007.088, 128, (128, 8, 8)),
    "cifar_resnet50": Known(23_705_252, 1298.014, 2048, (2048, 4, 4)),
    "wrn_16_1": Known(180_916, 26.663, 64, (64, 8, 8)),
    "wrn_16_2": Known(703_284, 101.118, 128, (128, 8, 8)),
    "wrn_40_1": Known(569_780, 83.286, 64, (64, 8, 8)),
    "wrn_40_2": Known(2_255_156, 327.611, 128, (128, 8, 8)),
    "wrn_28_4": Known(5_872_180, 845.620, 256, (256, 8, 8)),
    "regnetx_200mf": Known(2_355_156, 223.351, 368, (368, 8, 8)),
    "regnetx_400mf": Known(4_813_988, 466.196, 384, (384, 8, 8)),
    "regnety_400mf": Known(5_749_012, 467.124, 384, (384, 8, 8)),
    "mobilenetv2": Known(2_353_060, 22.381, 1280, (320, 2, 2)),
    "shufflenetv1": Known(949_258, 38.691, 960, (960, 4, 4)),
    "shufflenetv2": Known(1_355_528, 44.504, 1024, (1024, 4, 4)),
    "shufflenetv2_x0_5": Known(443_716, 10.404, 1024, (1024, 4, 4)),
    "vgg8": Known(3_965_028, 96.193, 512, (512, 4, 4)),
    "vgg11": Known(9_277_284, 209.439, 512, (512, 4, 4)),
    "vgg13": Known(9_462_180, 284.936, 512, (512, 4, 4)),
    "vgg16": Known(14_774_436, 398.182, 512, (512, 4, 4)),
    "vgg19": Known(20_086_692, 511.429, 512, (512, 4, 4)),
}
RESIDUAL = [name for name in NETWORKS if name.startswith(("resnet", "wrn"))]
SMALL = ["resnet8", "wrn_16_1"]
# One of most families, the smallest.
FAMILIES = {"cnn3", "resnet8", "wrn_16_1", "mobilenetv2", "shufflenetv2_x0_5", "vgg8"}
# Channels that `width` rounds to multiples of.
MULTIPLES = {"regnetx_200mf": 8, "regnetx_400mf": 16, "regnety_400mf": 16}
MULTIPLES |= {"shufflenetv1": 12, "shufflenetv2": 2, "shufflenetv2_x0_5": 2}


def images(batch: int = 2, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, height, width, generator=generator)


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@cache
def shapes_only(name: str, width: float = 1.0, in_channels: int = 3) -> Network:
    """A network without memory for its parameters, which is made at once."""
    with torch.device("meta"):
        return build_network(name, num_classes=100, in_channels=in_channels, width=width).eval()


def shapes_of(network: Network, channels: int, side: int) -> NetworkOutput:
    return network(torch.empty(2, channels, side, side, device="meta"))


def multiply_adds(network: Network, side: int = 32) -> float:
    """Those of convolutions and linear layers for one image [10⁶]."""
    counts: list[int] = []

    def count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        weight = layer.weight
        counts.append(output[0].numel() * weight.numel() // weight.shape[0])

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    shapes_of(network, 3, side)
    for hook in hooks:
        hook.remove()
    return sum(counts) / 1e6


@pytest.mark.parametrize("name", seldom(NETWORKS, FAMILIES))
def test_outputs_have_the_announced_shapes(name: str) -> None:
    network = build_network(name, num_classes=7, seed=0).eval()
    output = network(images(batch=3, height=16, width=16))
    side = KNOWN[name].feature_map[1] // 2
    assert isinstance(output, NetworkOutput)
    assert network.num_classes == 7
    assert output.logits.shape == (3, 7)
    assert output.feature.shape == (3, network.feature_dim)
    assert output.feature_map.shape == (3, network.map_channels, side, side)
    assert {output.logits.dtype, output.feature.dtype, output.feature_map.dtype} == {torch.float32}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_has_the_known_parameters_multiply_adds_and_shapes(name: str) -> None:
    network, known = shapes_only(name), KNOWN[name]
    assert parameter_count(network) == known.parameters
    assert multiply_adds(network) == pytest.approx(known.macs, abs=5e-4)
    output = shapes_of(network, channels=3, side=32)
    assert output.feature.shape == (2, known.feature_dim)
    assert output.feature_map.shape[1:] == known.feature_map
    assert (network.feature_dim, network.map_channels) == (known[2], known.feature_map[0])


# The depth of a residual network makes no difference here.
@pytest.mark.parametrize(
    "name", seldom([*SMALL, *(name for name in NETWORKS if name not in RESIDUAL)], FAMILIES)
)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32), (3, 64)])
def test_images_of_the_usual_shapes_are_taken(name: str, channels: int, side: int) -> None:
    network = shapes_only(name, in_channels=channels)
    output = shapes_of(network, channels, side)
    assert output.logits.shape == (2, 100)
    # Strides round up, poolings down.
    assert abs(output.feature_map.shape[2] - side * KNOWN[name].feature_map[1] / 32) < 1


@pytest.mark.parametrize("name", seldom(NETWORKS, FAMILIES))
def test_width_of_a_half_scales_all_channels(name: str) -> None:
    full, half = shapes_only(name), shapes_only(name, width=0.5)
    rounding = MULTIPLES.get(name, 0)
    for wide, narrow in zip(full.modules(), half.modules(), strict=True):
        # MobileNetV2 narrower than 1 keeps its last convolution.
        if isinstance(wide, nn.BatchNorm2d) and wide.num_features != 1280:
            assert isinstance(narrow, nn.BatchNorm2d)
            assert abs(narrow.num_features * 2 - wide.num_features) <= rounding
    assert half.map_channels % MULTIPLES.get(name, 1) == 0


def test_mobilenet_of_half_width_is_that_of_representation_distillation() -> None:
    network = shapes_only("mobilenetv2", width=0.5)
    assert parameter_count(network) == 812_836
    assert multiply_adds(network) == pytest.approx(6.524, abs=5e-4)
    assert (network.feature_dim, network.map_channels) == (1280, 160)


@pytest.mark.parametrize("name", seldom(NETWORKS, FAMILIES))
def test_head_of_features_is_the_forward_pass(name: str) -> None:
    network = perturb(build_network(name, num_classes=5, seed=0), seed=2)
    inputs = images()
    whole, parts = network(inputs), network.head(network.features(inputs))
    assert torch.equal(whole.logits, parts.logits)
    assert torch.equal(whole.feature, parts.feature)
    assert torch.equal(whole.feature_map, parts.feature_map)


@pytest.mark.parametrize("name", seldom(NETWORKS, FAMILIES))
def test_feature_is_the_pooled_map_and_sign_is_announced(name: str) -> None:
    network = perturb(build_network(name, num_classes=5, seed=0), seed=2)
    output = network(images())
    if name != "mobilenetv2":
        torch.testing.assert_close(output.feature, output.feature_map.mean(dim=(2, 3)))
    assert network.signed_map == bool((output.feature_map < 0).any())


@pytest.mark.parametrize("name", seldom(NETWORKS, FAMILIES))
def test_folded_batch_norms_leave_the_output_as_it_was(name: str) -> None:
    network = perturb(build_network(name, num_classes=5, seed=0), seed=2).double()
    inputs = images().double()
    ensemble = TeacherEnsemble([network], [name])
    expected, known = network(inputs), ensemble(inputs)
    assert isinstance(ensemble.networks[0], torch.fx.GraphModule)
    torch.testing.assert_close(known.logits[0], expected.logits)
    torch.testing.assert_close(known.features[0], expected.feature)
    torch.testing.assert_close(known.feature_maps[0], expected.feature_map)
    torch.testing.assert_close(ensemble.classify(known.feature_maps), known.logits)
    assert parameter_count(ensemble.networks[0]) < parameter_count(network)


@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize("name", SMALL)
def test_network_is_one_graph_for_the_compiler(name: str) -> None:
    network = build_network(name, num_classes=5, seed=0)
    expected = network(images()).logits
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()).logits, expected)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(2, 9, 13), (5, 17, 8)])
def test_images_of_any_shape_are_taken(name: str, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    network = build_network(name, num_classes=4, in_channels=channels, seed=0)
    output = network(images(2, channels, height, width))
    assert output.logits.shape == (2, 4)
    assert output.feature_map.shape[2:] == (-(-height // 4), -(-width // 4))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = build_network(name, num_classes=3, seed=0, width=0.25)
    functional.cross_entropy(network(images(batch=4)).logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_narrowest_network_has_one_channel_and_still_works(name: str) -> None:
    network = build_network(name, num_classes=3, seed=0, width=1e-6)
    output = network(images())
    assert output.feature_map.shape == (2, 1, 2, 2)
    assert output.logits.shape == (2, 3)


@pytest.mark.parametrize("name", SMALL)
def test_seed_decides_the_initialisation(name: str) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        return build_network(name, num_classes=3, seed=seed).state_dict()

    first, same, other = state(0), state(0), state(1)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_seeded_initialisation_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_network("resnet8", num_classes=3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_initialisation_without_a_seed_draws_from_the_global_generator() -> None:
    first = build_network("resnet8", num_classes=3).classifier.weight
    second = build_network("resnet8", num_classes=3).classifier.weight
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2"])
def test_convolutions_have_the_variance_of_he_fan_out(name: str) -> None:
    network = build_network(name, num_classes=3, seed=0)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000]
    for layer in layers:
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_wide_resnet_shortcut_is_identity_on_the_raw_input() -> None:
    network = build_network("wrn_16_1", num_classes=3, seed=0).eval()
    block = network.groups[0][0]
    nn.init.zeros_(block.residual[-1].weight)
    inputs = images(channels=16)
    assert torch.equal(block(inputs), inputs)


def test_wide_resnet_projection_takes_the_activated_input() -> None:
    network = build_network("wrn_16_2", num_classes=3, seed=0).eval()
    block = network.groups[0][0]
    nn.init.zeros_(block.residual[-1].weight)
    inputs = images(channels=16)
    expected = block.shortcut(functional.relu(block.activation[0](inputs)))
    torch.testing.assert_close(block(inputs), expected)


def test_unknown_network_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown network 'resnet9'; did you mean 'resnet"):
        build_network("resnet9", num_classes=3)


def test_unknown_argument_is_named_with_the_nearest() -> None:
    message = r"resnet8\.widths: unknown key; did you mean 'width'\?"
    with pytest.raises(ConfigError, match=message):
        build_network("resnet8", num_classes=3, widths=0.5)


def test_arguments_of_a_networks_own_are_checked_without_making_it() -> None:
    check_network_arguments("resnet8", {"channels": (4, 4, 8, 16)}, "x")
    check_network_arguments("timm:deit_tiny_patch16_224", {"anything": 1}, "x")
    with pytest.raises(ConfigError, match=r"x\.chanels: unknown key; did you mean 'channels'\?"):
        check_network_arguments("resnet8", {"chanels": (4, 4, 8, 16)}, "x")
    for given in ("width", "num_classes", "seed"):
        with pytest.raises(ConfigError, match=rf"x\.{given}: cannot be given here"):
            check_network_arguments("resnet8", {given: 2}, "x")


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_width_that_is_not_positive_is_an_error(width: float) -> None:
    with pytest.raises(ConfigError, match="width: expected a finite number > 0, got"):
        build_network("resnet8", num_classes=3, width=width)


def test_depth_that_no_network_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"depth: expected 6n \+ 2 .* found 10"):
        ResNet(10, num_classes=3)
    with pytest.raises(ConfigError, match=r"depth: expected 6n \+ 4 .* found 4"):
        WideResNet(4, 1, num_classes=3)


# In the backward pass of those, torch 2.14 writes beyond its memory.
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_no_network_of_small_width_strides_by_pointwise_convolutions(name: str) -> None:
    assert all(map(strides_safely, shapes_only(name, width=0.25).modules()))


def test_a_subsampled_pointwise_convolution_is_a_strided_one() -> None:
    strided, plain = nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(4, 8, 1)
    plain.load_state_dict(strided.state_dict())
    for size in (8, 9):
        inputs = torch.randn(2, 4, size, size)
        torch.testing.assert_close(plain(subsample(2)(inputs)), strided(inputs))
    assert not strides_safely(strided)
    assert strides_safely(plain)
