import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from agents.isolation import Isolation


def draw() -> list[float]:
    """One number of each of the global generators."""
    legacy = np.random.random()  # noqa: NPY002 - what Stable-Baselines3 draws from
    return [random.random(), float(legacy), float(torch.rand(()))]


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - as above
    torch.manual_seed(number)


def test_generators_go_on_as_if_the_block_had_never_run() -> None:
    seed(1)
    expected = [draw(), draw()]
    seed(1)
    found = [draw()]
    with Isolation()():
        seed(2)
        draw()
    assert [*found, draw()] == expected


def test_a_block_goes_on_where_the_one_before_ended() -> None:
    seed(2)
    expected = [draw(), draw()]
    isolated = Isolation()
    with isolated():
        seed(2)
        found = [draw()]
    seed(3)
    with isolated():
        found.append(draw())
    assert found == expected


def test_two_isolations_do_not_know_of_each_other() -> None:
    first, second = Isolation(), Isolation()
    drawn: dict[Any, list[list[float]]] = {first: [], second: []}
    for isolated in (first, second):
        with isolated():
            seed(4)
    for isolated in (first, second, first, second):
        with isolated():
            drawn[isolated].append(draw())
    assert drawn[first] == drawn[second]
    assert drawn[first][0] != drawn[first][1]


def fail_in_isolation() -> None:
    with Isolation()():
        seed(2)
        torch.backends.cudnn.deterministic = True
        raise ZeroDivisionError


def test_all_is_put_back_after_an_error() -> None:
    cudnn = torch.backends.cudnn
    seed(1)
    expected = draw()
    seed(1)
    with torch.backends.cudnn.flags(deterministic=False, benchmark=True):
        with pytest.raises(ZeroDivisionError):
            fail_in_isolation()
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    assert draw() == expected


def test_flags_of_cudnn_are_put_back() -> None:
    cudnn = torch.backends.cudnn
    with torch.backends.cudnn.flags(deterministic=False, benchmark=True):
        with Isolation()():
            cudnn.deterministic, cudnn.benchmark = True, False
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


def test_only_the_named_warnings_are_hidden() -> None:
    with Isolation()(ignore=("of no interest",)):
        warnings.warn("of no interest at all", UserWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="of interest"):
            warnings.warn("of interest", UserWarning, stacklevel=1)


@pytest.mark.gpu(pretended=False)
def test_generators_of_a_gpu_are_put_back_too() -> None:
    torch.manual_seed(1)
    expected = torch.rand((), device="cuda")
    torch.manual_seed(1)
    with Isolation()():
        torch.manual_seed(2)
        torch.rand((), device="cuda")
    assert torch.rand((), device="cuda") == expected
