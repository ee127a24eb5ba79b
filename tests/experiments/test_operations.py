"""Counts of operations, waits of the host and FLOPs, exact on functions whose work is known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks.operations import OperationCounter, OperationWatch, counting

CPU = torch.device("cpu")


def counted(work: Callable[[], Any], device: torch.device = CPU) -> OperationCounter:
    with counting(device) as counter:
        work()
    return counter


VALUES = torch.randn(6, 4)
MASK = VALUES > 0


@pytest.mark.parametrize(
    ("work", "operations"),
    [
        (lambda: VALUES + 1, 1),
        (lambda: VALUES.view(4, 6).transpose(0, 1).unsqueeze(0)[0, 1:], 0),
        (lambda: VALUES.detach(), 0),
        (lambda: torch.empty(3), 0),
        (lambda: torch.zeros(3), 1),
        (lambda: VALUES.t().contiguous(), 1),
        (lambda: VALUES.t().reshape(-1), 1),
        (lambda: VALUES.softmax(1), 1),
        (lambda: functional.linear(VALUES, torch.ones(2, 4), torch.ones(2)), 3),
        (lambda: VALUES.clone().add_(1).mul_(2), 3),
        (lambda: torch._foreach_add([VALUES, VALUES], 1), 1),
    ],
)
def test_operations_are_what_starts_a_kernel(work: Callable[[], Any], operations: int) -> None:
    assert counted(work).operations == operations


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda: VALUES.sum().item(), 1),
        (lambda: float(VALUES.sum()), 1),
        (lambda: bool(MASK.any()), 1),
        (lambda: torch.equal(VALUES, VALUES), 1),
        (lambda: VALUES.nonzero(), 1),
        (lambda: torch.where(MASK), 1),
        (lambda: VALUES.masked_select(MASK), 1),
        (lambda: VALUES[MASK], 1),
        (lambda: VALUES.clone().index_put_((MASK,), torch.zeros(())), 1),
        (lambda: VALUES.long().unique(), 1),
        (lambda: MASK.flatten().long().bincount(), 1),
        (lambda: VALUES.cpu().numpy(), 1),
        (lambda: VALUES.tolist(), 1),
        (lambda: torch.linalg.solve(torch.eye(4), VALUES.t()), 1),
        (lambda: torch.linalg.solve_ex(torch.eye(4), VALUES.t()), 0),
        (lambda: VALUES[torch.tensor([0, 2])], 0),
        (lambda: VALUES.index_select(0, torch.tensor([0, 2])), 0),
        (lambda: torch.where(MASK, VALUES, 0), 0),
        (lambda: VALUES.clone().masked_fill_(MASK, 0), 0),
        (lambda: VALUES.to(torch.float64).sum(), 0),
        (lambda: VALUES.clone().copy_(VALUES), 0),
    ],
)
def test_the_host_waits_for_values_and_for_shapes_that_depend_on_them(
    work: Callable[[], Any], waits: int
) -> None:
    assert counted(work).synchronizations == waits


def test_a_backward_pass_is_counted() -> None:
    weight = torch.ones(4, 2, requires_grad=True)
    # Product and sum; ones for the gradient of the sum, which is expanded, and one product.
    assert counted(lambda: (VALUES @ weight).sum().backward()).operations == 4


def test_flops_are_those_of_torchs_own_counter() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    )
    images = torch.randn(5, 1, 4, 4)

    def work() -> None:
        network(images).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        work()
    counts = counted(work)
    assert counts.flops == theirs.get_total_flops()
    forward = 5 * 2 * (3 * 9 * 16 + 48 * 2)
    assert counted(torch.no_grad()(lambda: network(images))).flops == forward


def test_inference_mode_changes_no_count() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(5, 1, 4, 4)
    network.eval()
    usual = counted(torch.no_grad()(lambda: network(images)))
    inference = counted(torch.inference_mode()(lambda: network(images)))
    assert (inference.operations, inference.flops) == (usual.operations, usual.flops)
    assert inference.flops > 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_does_not_wait(kind: Callable[..., torch.optim.Optimizer]) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)
    weight.grad = torch.ones(3)
    counts = counted(optimizer.step)
    assert counts.operations > 0
    assert counts.synchronizations == 0
    assert counted(lambda: weight.sum().item()).synchronizations == 1


def test_what_is_on_the_host_is_nothing_to_a_gpu() -> None:
    counts = counted(lambda: (VALUES + 1).sum().item(), torch.device("cuda"))
    assert (counts.operations, counts.synchronizations) == (0, 0)


def test_copies_between_devices_are_counted_unless_they_do_not_block() -> None:
    meta = torch.device("meta")

    def work(*, non_blocking: bool) -> Tensor:
        return VALUES.to(meta, non_blocking=non_blocking)

    assert counted(lambda: work(non_blocking=False), meta).synchronizations == 1
    assert counted(lambda: work(non_blocking=True), meta).synchronizations == 0
    assert counted(lambda: torch.empty(6, 4, device=meta).copy_(VALUES), meta).synchronizations == 1
    assert counted(lambda: torch.empty(2, device=meta).double(), meta).synchronizations == 0


def test_a_watch_counts_between_its_start_and_its_stop() -> None:
    watch = OperationWatch(CPU)
    for count in (1, 3):
        watch.start()
        for _ in range(count):
            VALUES.sum().item()
        reading = watch.stop()
        VALUES.sum().item()
        assert reading == {"operations": 2 * count, "synchronizations": count, "flops": 0}


@pytest.mark.gpu(pretended=False)
def test_a_step_on_a_gpu_is_counted_as_on_a_cpu() -> None:
    device = torch.device("cuda")
    weight = torch.ones(4, 2, device=device, requires_grad=True)
    values = VALUES.to(device)
    counts = counted(lambda: (values @ weight).sum().backward(), device)
    assert (counts.operations, counts.synchronizations) == (4, 0)
    assert counted(lambda: values.sum().item(), device).synchronizations == 1
    assert counted(lambda: values.cpu(), device).synchronizations == 1
