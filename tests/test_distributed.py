from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mtkd_env import distributed
from processes import Pair, two_processes

ROWS, WIDTH = 6, 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_processes(tmp_path_factory.mktemp("group")) as processes:
        yield processes


def batch(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def test_a_single_process_gets_back_what_it_gave() -> None:
    values, module = batch(WIDTH), nn.BatchNorm1d(WIDTH)
    assert not distributed.active()
    assert (distributed.rank(), distributed.processes()) == (0, 1)
    for together in (
        distributed.total,
        distributed.mean,
        distributed.gather,
        distributed.broadcast,
    ):
        assert together(values) is values
    assert torch.equal(distributed.local_part(values), values)
    assert distributed.agree("yes") == "yes"
    assert distributed.data_parallel(module) is module
    assert distributed.synchronize_norms(module) is module


def _collectives() -> dict[str, object]:
    number = distributed.rank()
    own = torch.full((2, 1), float(number))
    return {
        "rank": number,
        "total": distributed.total(own).tolist(),
        "mean": distributed.mean(own).tolist(),
        "gather": distributed.gather(own).tolist(),
        "broadcast": distributed.broadcast(own).tolist(),
        "agree": distributed.agree(f"process {number}"),
        "own": own.tolist(),
        "part": distributed.local_part(torch.arange(4)).tolist(),
    }


def test_processes_meet(pair: Pair) -> None:
    results = pair(_collectives)
    for number, result in enumerate(results):
        assert result.pop("own") == [[number], [number]]
        assert result.pop("rank") == number
        assert result.pop("part") == [2 * number, 2 * number + 1]
    together = {
        "total": [[1], [1]],
        "mean": [[0.5], [0.5]],
        "gather": [[0], [0], [1], [1]],
        "broadcast": [[0], [0]],
        "agree": "process 0",
    }
    assert results == [together, together]


def _norm_layers(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    if len(shape) == 1:
        return nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2)).double()
    layers = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 2, 1), nn.BatchNorm2d(2))
    return layers.double()


def _loss(module: nn.Module, rows: Tensor) -> Tensor:
    # Not symmetric in the rows, so that a mistake in the exchange of gradients shows.
    return (module(rows).pow(3).flatten(1).sum(1) * rows.flatten(1)[:, 0]).mean()


def _train_in_parts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    module = distributed.synchronize_norms(_norm_layers(shape))
    parallel = distributed.data_parallel(module)
    rows = distributed.local_part(batch(*shape)).clone().requires_grad_()
    loss = _loss(parallel, rows)
    loss.backward()
    assert rows.grad is not None
    gradients = {f"{name}.grad": p.grad.clone() for name, p in module.named_parameters()}
    found = {**module.state_dict(), **gradients, "loss": distributed.mean(loss)}
    return {**found, "rows": distributed.gather(rows.grad) / distributed.processes()}


@pytest.mark.parametrize("shape", [(WIDTH,), (WIDTH, 4, 5)], ids=str)
def test_a_batch_in_two_parts_has_the_gradients_and_statistics_of_the_whole(
    pair: Pair, shape: tuple[int, ...]
) -> None:
    module, rows = _norm_layers(shape), batch(*shape).requires_grad_()
    loss = _loss(module, rows)
    loss.backward()
    gradients = {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    expected = {**module.state_dict(), **gradients, "loss": loss.detach(), "rows": rows.grad}
    for found in pair(_train_in_parts, shape):
        torch.testing.assert_close(found, expected)


def _average() -> tuple[list[float], bool]:
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    used.grad = torch.tensor([1.0, 2.0]) * (1 + 2 * distributed.rank())
    distributed.average_gradients([used, unused])
    return used.grad.tolist(), unused.grad is None


def test_gradients_are_averaged(pair: Pair) -> None:
    assert pair(_average) == [([2.0, 4.0], True)] * 2


def _evaluate_norm() -> Tensor:
    module = distributed.synchronize_norms(_norm_layers((WIDTH,))).eval()
    return module(batch(WIDTH)).detach()


def test_synchronised_norms_evaluate_as_plain_ones_do(pair: Pair) -> None:
    expected = _norm_layers((WIDTH,)).eval()(batch(WIDTH))
    for found in pair(_evaluate_norm):
        torch.testing.assert_close(found, expected)
