"""Networks of timm, which is optional."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from mtkd_env.errors import ConfigError
from mtkd_env.networks import Network, build_network, find_network
from mtkd_env.networks.libraries import published_input
from mtkd_env.networks.timm_models import download, weight_names
from mtkd_env.teachers import TeacherEnsemble
from tiny import CLASSES, seldom

timm = pytest.importorskip("timm", reason="needs timm, the extra 'timm'")

# Parameters, multiply-adds [10⁹] and width for 1000 classes; Table 3 of Yang et al. (2025).
KNOWN = {
    "deit_tiny_patch16_224": (5_717_416, 1.25, 192),
    "deit_small_patch16_224": (22_050_664, 4.60, 384),
    "deit_base_patch16_224": (86_567_656, 17.56, 768),
    "cait_xxs24_224": (11_956_264, 2.52, 192),
    "cait_s24_224": (46_916_200, 9.33, 384),
}
# One of every kind, as small as they come: arguments and side of the images.
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "deit_tiny_patch16_224": ({"img_size": 64, "depth": 1}, 64),
    "deit_tiny_distilled_patch16_224": ({"img_size": 64, "depth": 1}, 64),
    "cait_xxs24_224": ({"img_size": 64, "depth": 1}, 64),
    "mixer_s32_224": ({"img_size": 64}, 64),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (1, 1)}, 56),
    "mobilenetv3_small_050": ({}, 64),
    "resnet10t": ({}, 64),
}
CLASS_TOKEN = ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224")


def small(model: str) -> tuple[Network, Tensor]:
    arguments, side = SMALL[model]
    network = build_network(
        f"timm:{model}", num_classes=CLASSES, image_size=(side, side), seed=0, **arguments
    )
    inputs = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    return network.eval().double(), inputs.double()


@pytest.mark.parametrize("model", seldom(KNOWN, {"deit_tiny_patch16_224", "cait_xxs24_224"}))
def test_transformer_has_the_known_parameters_multiply_adds_and_shapes(model: str) -> None:
    parameters, macs, width = KNOWN[model]
    with torch.device("meta"):
        network = build_network(f"timm:{model}", num_classes=1000).eval()
    with FlopCounterMode(display=False) as counter:
        output = network(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.01)
    assert output.feature.shape == (1, width)
    assert output.feature_map.shape == (1, width, 14, 14)
    assert (network.feature_dim, network.map_channels) == (width, width)
    assert network.signed_map


@pytest.mark.parametrize("model", SMALL)
def test_a_model_of_timm_gives_its_own_logits_and_features(model: str) -> None:
    network, inputs = small(model)
    theirs = network.get_submodule("model")
    last = theirs.forward_features(inputs)
    output = network(inputs)
    assert torch.equal(output.logits, theirs(inputs))
    assert torch.equal(output.feature, theirs.forward_head(last, pre_logits=True))
    assert output.feature.shape == (2, network.feature_dim)
    assert output.feature_map.shape[:2] == (2, network.map_channels)
    assert torch.equal(output.feature_map, network.features(inputs))
    assert network.signed_map == bool((output.feature_map < 0).any())
    if last.ndim == 3:
        patches = output.feature_map.flatten(2).transpose(1, 2)
        assert torch.equal(patches, last[:, last.shape[1] - patches.shape[1] :])


@pytest.mark.parametrize("model", SMALL)
def test_the_head_takes_the_mean_of_the_patches_where_there_is_a_class_token(model: str) -> None:
    network, inputs = small(model)
    output = network(inputs)
    found = network.head(output.feature_map)
    if model in CLASS_TOKEN:
        torch.testing.assert_close(found.feature, output.feature_map.mean(dim=(2, 3)))
    else:
        torch.testing.assert_close(found.logits, output.logits)


@pytest.mark.parametrize("model", SMALL)
def test_the_ensemble_folds_models_of_timm(model: str) -> None:
    network, inputs = small(model)
    expected = network(inputs)
    ensemble = TeacherEnsemble([network], ["a"])
    known = ensemble(inputs)
    assert isinstance(ensemble.networks[0], fx.GraphModule)
    torch.testing.assert_close(known.logits[0], expected.logits)
    torch.testing.assert_close(known.features[0], expected.feature)
    torch.testing.assert_close(known.feature_maps[0], expected.feature_map)
    head = network.head(expected.feature_map).logits
    torch.testing.assert_close(ensemble.classify([expected.feature_map])[0], head)


def test_names_of_timm_are_checked_with_the_nearest() -> None:
    find_network("timm:deit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="did you mean 'timm:deit_tiny_patch16_224'"):
        find_network("timm:deit_tny_patch16_224")
    with pytest.raises(ConfigError, match="'fb_in1k' may be the checkpoint of a teacher"):
        find_network("timm:deit_tiny_patch16_224.fb_in1k")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "image size": ({"image_size": (8, 8)}, r"cannot take images of 3x8x8: .* doesn't match model"),
    "width": ({"width": 0.25}, "has a fixed width, expected 1, found 0.25"),
    "argument": ({"dept": 1}, "'timm:deit_tiny_patch16_224': .*'dept'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_model_of_timm_cannot_take_is_an_error(case: str) -> None:
    arguments, message = WRONG[case]
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_network("timm:deit_tiny_patch16_224", num_classes=CLASSES, **arguments)


def test_weights_of_timm_are_named_by_their_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 3)
    asked: list[tuple[str, bool]] = []

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return model

    assert "fb_in1k" in weight_names("deit_small_patch16_224")
    assert weight_names("cait_s24_224") == ["fb_dist_in1k"]
    monkeypatch.setattr(timm, "create_model", create_model)
    state = download("deit_small_patch16_224", "fb_in1k")
    assert asked == [("deit_small_patch16_224.fb_in1k", True)]
    assert state.keys() == {"weight", "bias"}


def test_the_input_of_published_weights_is_known() -> None:
    assert published_input("timm:vit_tiny_patch16_224", "augreg_in21k_ft_in1k") == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "size": (224, 224),
        "interpolation": "bicubic",
        "channels": "rgb",
    }
