from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional

from mtkd_env.errors import ConfigError
from mtkd_env.networks import NETWORKS, Network, build_network
from mtkd_env.networks.resnet import ResNet
from mtkd_env.networks.wide_resnet import WideResNet
from mtkd_env.types import NetworkOutput

PUBLISHED = {
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_28_4": 5_872_180,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
}
SMALL = ["resnet8", "wrn_16_1"]


def images(batch: int = 2, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, height, width, generator=generator)


def resnet_parameters(blocks: int, channels: tuple[int, ...], classes: int) -> int:
    stem, *stages = channels
    total = 27 * stem + 2 * stem
    for number, (before, after) in enumerate(zip(channels, stages, strict=False)):
        total += 9 * before * after + (2 * blocks - 1) * 9 * after**2 + 2 * blocks * 2 * after
        if number > 0 or before != after:
            total += before * after + 2 * after
    return total + stages[-1] * classes + classes


def wide_resnet_parameters(blocks: int, widen: int, classes: int) -> int:
    channels = (16, 16 * widen, 32 * widen, 64 * widen)
    total = 27 * 16
    for before, after in pairwise(channels):
        norms = 2 * before + (2 * blocks - 1) * 2 * after
        total += 9 * before * after + (2 * blocks - 1) * 9 * after**2 + norms
        total += before * after if before != after else 0
    return total + 2 * channels[-1] + channels[-1] * classes + classes


def closed_form(name: str) -> int:
    if name.startswith("wrn"):
        depth, widen = (int(number) for number in name.split("_")[1:])
        return wide_resnet_parameters((depth - 4) // 6, widen, classes=100)
    depth, _, wide = name.removeprefix("resnet").partition("x")
    channels = (32, 64, 128, 256) if wide else (16, 16, 32, 64)
    return resnet_parameters((int(depth) - 2) // 6, channels, classes=100)


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shapes_only(name: str, width: float = 1.0) -> Network:
    """A network without memory for its parameters, which is made at once."""
    with torch.device("meta"):
        return build_network(name, num_classes=100, width=width)


def trained_statistics(network: Network) -> Network:
    """The network in evaluation mode, with batch norms that are no identities."""
    generator = torch.Generator().manual_seed(2)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.running_var):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            for value in (layer.bias.data, layer.running_mean):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_have_the_announced_shapes(name: str) -> None:
    network = build_network(name, num_classes=7, seed=0).eval()
    output = network(images(batch=3, height=16, width=16))
    assert isinstance(output, NetworkOutput)
    assert network.num_classes == 7
    assert output.logits.shape == (3, 7)
    assert output.feature.shape == (3, network.feature_dim)
    assert output.feature_map.shape == (3, network.map_channels, 4, 4)
    assert {output.logits.dtype, output.feature.dtype, output.feature_map.dtype} == {torch.float32}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count_is_that_of_the_architecture(name: str) -> None:
    count = parameter_count(shapes_only(name))
    assert count == closed_form(name)
    assert count == PUBLISHED.get(name, count)


def test_published_networks_are_in_the_table() -> None:
    assert set(PUBLISHED) <= set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_head_of_features_is_the_forward_pass(name: str) -> None:
    network = trained_statistics(build_network(name, num_classes=5, seed=0))
    inputs = images()
    whole, parts = network(inputs), network.head(network.features(inputs))
    assert torch.equal(whole.logits, parts.logits)
    assert torch.equal(whole.feature, parts.feature)
    assert torch.equal(whole.feature_map, parts.feature_map)


@pytest.mark.parametrize("name", NETWORKS)
def test_feature_is_the_pooled_map_and_sign_is_announced(name: str) -> None:
    network = trained_statistics(build_network(name, num_classes=5, seed=0))
    output = network(images())
    torch.testing.assert_close(output.feature, output.feature_map.mean(dim=(2, 3)))
    assert network.signed_map == bool((output.feature_map < 0).any())


@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_batch_norms_leave_the_output_as_it_was(name: str) -> None:
    network = trained_statistics(build_network(name, num_classes=5, seed=0)).double()
    inputs = images().double()
    folded = fuse(network)
    expected, output = network(inputs), folded(inputs)
    assert isinstance(folded, torch.fx.GraphModule)
    assert isinstance(output, NetworkOutput)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.feature, expected.feature)
    torch.testing.assert_close(output.feature_map, expected.feature_map)
    assert parameter_count(folded) < parameter_count(network)


@pytest.mark.usefixtures("_unchecked_shapes")
def test_folding_leaves_no_batch_norm_in_a_resnet() -> None:
    folded = fuse(build_network("resnet8", num_classes=5).eval())
    called = {node.target for node in folded.graph.nodes if node.op == "call_module"}
    modules = dict(folded.named_modules())
    assert not any(isinstance(modules[target], nn.BatchNorm2d) for target in called)


@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize("name", SMALL)
def test_network_is_one_graph_for_the_compiler(name: str) -> None:
    network = build_network(name, num_classes=5, seed=0)
    expected = network(images()).logits
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()).logits, expected)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 9, 13), (5, 17, 8)])
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


@pytest.mark.parametrize("name", NETWORKS)
def test_width_scales_all_channels(name: str) -> None:
    full, half = shapes_only(name), shapes_only(name, width=0.5)
    for wide, narrow in zip(full.modules(), half.modules(), strict=True):
        if isinstance(wide, nn.BatchNorm2d):
            assert isinstance(narrow, nn.BatchNorm2d)
            assert narrow.num_features * 2 == wide.num_features
    assert half.feature_dim * 2 == full.feature_dim
    assert half.map_channels * 2 == full.map_channels


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


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_width_that_is_not_positive_is_an_error(width: float) -> None:
    with pytest.raises(ConfigError, match="width: expected a positive factor, found"):
        build_network("resnet8", num_classes=3, width=width)


def test_depth_that_no_network_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"depth: expected 6n \+ 2 .* found 10"):
        ResNet(10, num_classes=3)
    with pytest.raises(ConfigError, match=r"depth: expected 6n \+ 4 .* found 4"):
        WideResNet(4, 1, num_classes=3)
