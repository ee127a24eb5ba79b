import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mtkd_env.networks.regressor import FeatureProjection, Regressor
from tiny import generator

Size = tuple[int, int]


def maps(height: int, width: int) -> Tensor:
    return torch.randn(3, 5, height, width, generator=generator(0), dtype=torch.float64)


def regressor(size: Size, *, signed: bool = False) -> Regressor:
    """For a single teacher."""
    return Regressor([nn.Conv2d(5, 7, 1)], size, signed=signed).double()


@pytest.mark.parametrize("size", [(3, 7), (4, 2)])
def test_enlarging_after_the_convolution_equals_enlarging_before_it(size: Size) -> None:
    module = regressor(size, signed=True)
    enlarged = functional.interpolate(maps(2, 3), size, mode="bilinear", align_corners=False)
    expected = functional.batch_norm(module.convolution(enlarged), None, None, training=True)
    torch.testing.assert_close(module(maps(2, 3)), (expected,))


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_a_larger_map_is_averaged(size: Size) -> None:
    module = regressor(size, signed=True)
    pooled = functional.adaptive_avg_pool2d(maps(4, 4), size)
    expected = functional.batch_norm(module.convolution(pooled), None, None, training=True)
    torch.testing.assert_close(module(maps(4, 4)), (expected,))


# Projections of features.


def test_a_feature_of_the_teachers_width_is_left_alone() -> None:
    projection, feature = FeatureProjection(5, 5), torch.randn(3, 5, generator=generator(0))
    assert projection(feature) is feature
    assert list(projection.parameters()) == []


def test_a_feature_of_another_width_is_normalised_and_mapped() -> None:
    projection = FeatureProjection(5, 7).double()
    feature = 3 + 2 * torch.randn(8, 5, generator=generator(0), dtype=torch.float64)
    normalised = functional.batch_norm(feature, None, None, training=True)
    linear = projection[1]
    assert isinstance(linear, nn.Linear)
    expected = normalised @ linear.weight.T + linear.bias
    for _ in range(2):  # nothing is dropped at random
        torch.testing.assert_close(projection(feature), expected)
