"""What the stand-in of a GPU refuses a GPU refuses; what it computes the host computes."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agents import AGENTS, build_agent
from experiments import run
from experiments.running.log import read_rows
from mtkd_env import losses
from mtkd_env.files import save_checkpoint
from mtkd_env.weighting import WEIGHTINGS
from pretended_gpu import pretended_gpu
from tiny import (
    CONTRIB,
    SB3_ARGUMENTS,
    SMALL_RUN,
    make_tiny_env_on,
    seldom,
    snapshot,
)

GPU = torch.device("cuda", 0)


def test_the_gpu_is_gone_afterwards() -> None:
    before = torch.cuda.is_available(), torch.cuda.Stream, torch.load, torch.Generator
    with pretended_gpu():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available(), torch.cuda.Stream, torch.load, torch.Generator) == before


@pytest.mark.parametrize(
    "work",
    [
        lambda here, there: here + there,
        lambda here, there: there.mul_(here),
        lambda here, there: here @ there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.where(here > 0, there, there),
        lambda here, there: there.index_select(0, here[0].long()),
        lambda here, there: torch.index_put(there, [here[0].long()], here),
        lambda here, there: functional.mse_loss(there, here),
        lambda here, there: nn.Linear(2, 2)(there) + here,
    ],
)
def test_operations_on_tensors_of_both_sides_are_refused(
    work: Callable[[Tensor, Tensor], Any],
) -> None:
    with pretended_gpu():
        here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            work(here, there)


def test_a_number_and_indices_may_be_on_the_host() -> None:
    with pretended_gpu():
        there = torch.arange(4.0, device="cuda")
        found = (there * torch.tensor(2.0))[torch.tensor([3, 1])]
        assert found.device == GPU
        assert found.tolist() == [6, 2]


def test_no_array_is_made_of_what_is_there() -> None:
    with pretended_gpu():
        there = torch.ones(2, device="cuda")
        for array in (Tensor.numpy, np.asarray):
            with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
                array(there)
        assert there.cpu().numpy().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("make", "is_there"),
    [
        (lambda here, _: here.cuda(), True),
        (lambda here, _: here.to("cuda"), True),
        (lambda here, _: here.to(GPU, torch.float64, non_blocking=True), True),
        (lambda here, there: here.to(there), True),
        (lambda here, _: torch.as_tensor(here, device="cuda"), True),
        (lambda here, _: torch.as_tensor(here.numpy(), device="cuda"), True),
        (lambda here, _: here.new_zeros(2, device="cuda"), True),
        (lambda here, _: torch.zeros_like(here, device="cuda"), True),
        (lambda _, there: there.double(), True),
        (lambda _, there: there.to(torch.float64), True),
        (lambda _, there: deepcopy(there), True),
        (lambda _, there: there.new_zeros(2), True),
        (lambda _, there: functional.one_hot(there.long()), True),
        (lambda _, there: there.cpu(), False),
        (lambda _, there: there.to("cpu", torch.float64), False),
        (lambda here, there: there.to(here), False),
        (lambda _, there: torch.zeros_like(there, device="cpu"), False),
        (lambda _, there: there.new_ones(2, device="cpu"), False),
    ],
)
def test_tensors_are_new_ones_on_the_side_asked_for(
    make: Callable[[Tensor, Tensor], Tensor], is_there: bool
) -> None:
    with pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        found = make(here, there)
        assert found.is_cuda is is_there
        assert found.device.type == ("cuda" if is_there else "cpu")
        found.zero_()
        assert here.all()
        assert there.all()


def test_modules_gradients_and_optimizers_are_where_their_parameters_are(tmp_path: Path) -> None:
    with pretended_gpu():
        module = nn.Linear(2, 3).to("cuda")
        optimizer = torch.optim.SGD(module.parameters(), torch.tensor(0.1).cuda(), momentum=0.9)
        functional.cross_entropy(
            module(torch.ones(4, 2, device="cuda")), torch.ones(4).cuda().long()
        ).backward()
        optimizer.step()
        save_checkpoint(tmp_path / "x.pt", optimizer.state_dict())
        loaded = torch.load(tmp_path / "x.pt", map_location="cuda", weights_only=True)
        found = [module.weight, module.weight.grad, optimizer.state[module.weight]]
        found = [*found[:2], found[2]["momentum_buffer"], loaded["state"][0]["momentum_buffer"]]
        assert [one.device for one in found] == [GPU] * 4


def test_generators_belong_to_a_side() -> None:
    with pretended_gpu():
        there = torch.Generator("cuda").manual_seed(1)
        drawn = torch.rand(3, generator=there, device="cuda")
        assert drawn.tolist() == torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()
        with pytest.raises(RuntimeError, match="Expected a generator of the same device"):
            torch.rand(3, generator=there)


def trained(method: str, device: str) -> dict[str, Tensor]:
    env = make_tiny_env_on(device)
    agent = build_agent(method, env, seed=0, arguments=SB3_ARGUMENTS.get(method, {}))
    agent.learn(3, lambda: None)
    assert env.device.type == device
    student = snapshot(env.distiller.student)
    assert {one.device.type for one in student.values()} == {device}
    return {name: one.cpu() for name, one in student.items()}


# Of weightings and of the library's algorithms some: they take the same way to the environment.
OFTEN = {"camkd", "mmkd", "pg", "dpg", "ppo"}
EVERY = seldom(sorted({*WEIGHTINGS, *AGENTS, *SB3_ARGUMENTS, "a2c", "ppo", "sac"}), OFTEN)


@pytest.mark.parametrize("method", EVERY)
def test_every_method_trains_the_same_student_there(method: str) -> None:
    if method in CONTRIB:
        pytest.importorskip("sb3_contrib")
    expected = trained(method, "cpu")
    with pretended_gpu():
        found = trained(method, "cuda")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_program_that_mixes_both_sides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = losses.kd_divergence

    def forgetful(*arguments: Any) -> Tensor:
        found = plain(*arguments)
        return found + torch.zeros(found.shape)

    monkeypatch.setattr(losses, "kd_divergence", forgetful)
    trained("aver", "cpu")
    with (
        pretended_gpu(),
        pytest.raises(RuntimeError, match=r"on the same device: of aten\.add"),
    ):
        trained("aver", "cuda")


@pytest.mark.parametrize(
    ("flags", "flags_there"),
    [
        ("--algo pg", "--prefetch 2"),
        pytest.param("--algo ppo --agent.arguments.n_steps 2", "", marks=pytest.mark.slow),
        *(
            pytest.param(
                "--algo pg --data.views 2",
                f"--teachers.store.place {place} --teachers.store.dtype float32",
                marks=pytest.mark.slow,
            )
            for place in ("device", "host", "disk")
        ),
    ],
)
def test_a_run_comes_to_the_same_numbers_there(
    flags: str, flags_there: str, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL_RUN, encoding="utf-8")

    def rows(device: str, flags: str) -> list[dict[str, Any]]:
        output = tmp_path / device
        argv = ["--config", str(tmp_path / "small.yaml"), *flags.split(), "--device", device]
        assert run.main([*argv, "--output", str(output)]) == 0
        (folder,) = output.iterdir()
        return read_rows(folder)

    with pretended_gpu():
        found = rows("cuda", f"{flags} {flags_there}")
    for row, expected in zip(found, rows("cpu", flags), strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - {"seconds"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_what_a_gpu_cannot_repeat_is_refused_where_that_is_asked_for() -> None:
    with pretended_gpu():
        maps = torch.ones(1, 1, 3, 3, device="cuda", requires_grad=True)
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                functional.adaptive_avg_pool2d(maps, 2).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
