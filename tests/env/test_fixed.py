"""Facts of the weights that are chosen by hand."""

from typing import Any

import pytest
import torch

from mtkd_env.errors import ConfigError
from mtkd_env.types import TeacherWeights
from mtkd_env.weighting.fixed import Fixed
from tiny import NUM_ENVS, TEACHERS, batch, make_tiny_distiller

FIRST, SECOND, THIRD = TEACHERS


def weights_of(**arguments: Any) -> TeacherWeights:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    return Fixed(distiller, **arguments)(state)


@pytest.mark.parametrize(
    ("shares", "row"),
    [
        (None, [1 / 3, 1 / 3, 1 / 3]),
        ([1, 0, 3], [0.25, 0.0, 0.75]),
        ({SECOND: 2.0}, [0.0, 1.0, 0.0]),
        ({THIRD: 1, FIRST: 3}, [0.75, 0.0, 0.25]),
    ],
)
def test_every_sample_has_the_given_shares_in_both_heads(shares: Any, row: list[float]) -> None:
    weights = weights_of(weights=shares)
    for head in (weights.logit, weights.feature):
        torch.testing.assert_close(head, torch.tensor(row).expand(NUM_ENVS, -1))


def test_the_feature_head_may_have_shares_of_its_own() -> None:
    weights = weights_of(weights=[1, 0, 0], feature_weights=[0, 0, 1])
    assert weights.logit[0].tolist() == [1, 0, 0]
    assert weights.feature[0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("key", ["weights", "feature_weights"])
@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ([1, 0], "expected 3 shares"),
        ([0, 0, 0], "not all 0"),
        ([1, -1, 1], ">= 0"),
        ([1, float("nan"), 1], "finite"),
        ([1, float("inf"), 1], "finite"),
        ([1, "half", 1], "numbers"),
        ("best", "numbers"),
        ({"teacher": 1}, "unknown"),
    ],
)
def test_shares_that_cannot_be_are_named(key: str, shares: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){key}.*{says}|{says} {key}"):
        weights_of(**{key: shares})
