import json
import os
import signal
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from experiments.console import console
from experiments.running.result import read_result
from experiments.transfer import training
from experiments.transfer.program import TaskResult, TransferConfig
from experiments.transfer.schedule import Schedule
from experiments.transfer.training import TaskRun, VisionTask
from mtkd_env import ConfigError, distributed
from mtkd_env.files import load_checkpoint
from mtkd_env.keeping import CheckpointConfig, Stopped
from mtkd_env.seeding import seeded
from processes import two_processes
from run_folders import comparable

BATCH, STEPS = 4, 5
QUIET = console(quiet=True)

# A share of the time would depend on the machine.
ALWAYS = CheckpointConfig(share=1.0)


class Squares(VisionTask):
    """Finds the mean brightness of noise, by a network with batch norm, and dropout if `random`."""

    def __init__(self, *, random: bool = True, seed: int = 0) -> None:
        with seeded(seed):
            self.model = nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Dropout(0.5 * random),
                nn.Flatten(),
                nn.Linear(64, 1),
            )
        self.steps_per_epoch = STEPS
        self._random = random
        self.asked: list[tuple[int, int]] = []
        self.before_step: Callable[[int], None] = lambda _: None

    def batches(self, epoch: int, begin: int = 0) -> Iterator[Tensor]:
        self.asked.append((epoch, begin))
        # What is drawn when the epoch begins counts in all its steps.
        generator = torch.Generator().manual_seed(epoch)
        offset = torch.rand(1, generator=generator) * self._random
        for number in range(begin, STEPS):
            self.before_step(epoch * STEPS + number)
            batch = images(BATCH, seed=epoch * STEPS + number) + offset
            yield distributed.local_part(batch)

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        errors = self.model(batch).squeeze(1) - batch.mean((1, 2, 3))
        return {"square": errors.square().mean(), "absolute": 0.1 * errors.abs().mean()}

    def evaluate(self) -> dict[str, float]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        inputs = images(8, seed=-1)
        error = functional.mse_loss(self.model(inputs).squeeze(1), inputs.mean((1, 2, 3)))
        return {"score": -float(error), "constant": 1.0}

    def pictures(self, count: int) -> Tensor:
        return torch.full((count - 3, 3, 6, 10), 128, dtype=torch.uint8)


class SquaresRun(TaskRun[TransferConfig]):
    program = "squares.py"
    config_type = TransferConfig


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.rand(count, 1, 1, 1, generator=generator) + torch.rand(
        count, 1, 6, 6, generator=generator
    )


def schedule(epochs: int = 3, **values: Any) -> Schedule:
    return Schedule(**{"lr": 0.02, "epochs": epochs, **values})


def run(
    folder: Path,
    task: VisionTask | None = None,
    *,
    resume: bool = False,
    out: Console = QUIET,
    **values: Any,
) -> dict[str, float]:
    places = {"data": "none", "output": str(folder), "device": "cpu"}
    config = TransferConfig(**places | {"schedule": schedule()} | values)
    made = SquaresRun(config, out)
    made.task_type = lambda *_: task or Squares()
    return made.complete(folder, resume=resume).metrics


def read_metrics(folder: Path) -> dict[str, float] | None:
    result = read_result(TaskResult, folder)
    return result and result.metrics


def weights(folder: Path) -> dict[str, Tensor]:
    network: dict[str, Tensor] = load_checkpoint(folder / "model.pt")["network"]
    return network


def assert_same_run(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert comparable(first) == comparable(second)
    assert read_metrics(first) == read_metrics(second)


# The schedule.


def rates(plan: Schedule, steps_per_epoch: int) -> list[float]:
    recipe = plan.recipe(steps_per_epoch)
    return [recipe.lr * recipe.share(float(step)) for step in range(recipe.epochs)]


def test_the_rate_of_step_falls_after_whole_epochs() -> None:
    plan = Schedule(lr=0.02, epochs=24, milestones=(16, 22))
    found = rates(plan, 7)
    assert found == pytest.approx([0.02] * 16 * 7 + [0.002] * 6 * 7 + [0.0002] * 2 * 7)


def test_milestones_of_iterations_are_iterations() -> None:
    plan = Schedule(lr=0.1, iterations=6, milestones=(2, 5, 9))
    assert rates(plan, 1000) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.01, 0.001])


def test_poly_falls_to_its_end_by_its_power() -> None:
    plan = Schedule(lr=0.01, iterations=80, kind="poly", min_lr=1e-4)
    expected = [(0.01 - 1e-4) * (1 - step / 80) ** 0.9 + 1e-4 for step in range(80)]
    assert rates(plan, 3) == pytest.approx(expected)


def test_the_warm_up_is_linear_in_steps() -> None:
    plan = Schedule(lr=1.0, epochs=3, warmup_steps=4, warmup_factor=0.2, milestones=(2,))
    assert rates(plan, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6, *[0.1] * 5])


BAD_SCHEDULES: dict[str, tuple[dict[str, Any], str]] = {
    "no length": (
        {"epochs": None},
        "expected either epochs or iterations, got epochs None and iterations None",
    ),
    "two lengths": (
        {"iterations": 5},
        "expected either epochs or iterations, got epochs 3 and iterations 5",
    ),
    "epochs": ({"epochs": 0}, "epochs: expected at least 1, got 0"),
    "iterations": (
        {"epochs": None, "iterations": -1},
        "iterations: expected at least 1, got -1",
    ),
    "kind": ({"kind": "cosine"}, "kind: unknown name 'cosine' (known: poly, step)"),
    "milestones": (
        {"milestones": (0, 3)},
        "milestones: expected at least 1, got 0",
    ),
    "warmup_steps": ({"warmup_steps": -1}, "warmup_steps: expected a finite number >= 0, got -1"),
    "warmup_factor": (
        {"warmup_factor": 2.0},
        "warmup_factor: expected a share in [0, 1], got 2.0",
    ),
    "lr": ({"lr": -1.0}, "lr: expected a finite number >= 0, got -1.0"),
    "clip": ({"clip": 0.0}, "clip: expected a finite number > 0, got 0.0"),
    "power": ({"power": -1.0}, "power: expected a finite number >= 0, got -1.0"),
}


@pytest.mark.parametrize("case", BAD_SCHEDULES)
def test_schedules_that_cannot_be_are_refused_by_name(case: str) -> None:
    values, expected = BAD_SCHEDULES[case]
    with pytest.raises(ConfigError) as error:
        schedule(**values)
    assert str(error.value) == expected


def test_a_warm_up_longer_than_the_training_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="warmup_steps: expected 0 to 15, all steps of the train"):
        run(tmp_path / "run", schedule=schedule(warmup_steps=16))
    assert not (tmp_path / "run").exists()


# What a run does.


def test_the_network_learns(tmp_path: Path) -> None:
    task = Squares(random=False)
    task.model.eval()
    with torch.no_grad():
        before = task.evaluate()["score"]
    after = run(tmp_path, task, schedule=schedule(epochs=20))
    assert after["score"] > 0.2 * before


def test_a_step_is_that_of_torchs_sgd(tmp_path: Path) -> None:
    plan = schedule(epochs=1, momentum=0.8, weight_decay=0.1)
    run(tmp_path, Squares(random=False), schedule=plan)
    task = Squares(random=False)
    optimizer = torch.optim.SGD(task.model.parameters(), 0.02, momentum=0.8, weight_decay=0.1)
    torch.manual_seed(training.derive_seed(0, "step 0 of process 0"))
    for batch in task.batches(0):
        optimizer.zero_grad()
        sum(task.losses(batch).values()).backward()
        optimizer.step()
    for name, tensor in task.model.state_dict().items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor)


def test_the_folder_holds_rows_pictures_network_and_result(tmp_path: Path) -> None:
    metrics = run(tmp_path, schedule=schedule(kind="poly"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "model.pt",
        "predictions.png",
        "result.json",
        "tensorboard",
    ]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"] == metrics == read_metrics(tmp_path)
    assert (result["steps"], result["epochs"], result["metric"]) == (3 * STEPS, 3, "score")
    scores = [row["val/score"] for row in comparable(tmp_path)]
    assert result["last"] == scores[-1]
    assert result["best"] == result["best_metrics"]["score"] == max(scores)
    assert result["best_epoch"] == 1 + scores.index(max(scores))
    # Five pictures of 6 x 10 in rows of two, four pixels between and around.
    with Image.open(tmp_path / "predictions.png") as image:
        assert image.size == (2 * 10 + 3 * 4, 3 * 6 + 4 * 4)


def test_a_row_has_the_rate_of_its_last_step_and_means_since_the_row_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WINDOW", 2)
    run(tmp_path, schedule=schedule(epochs=2, kind="poly"), evaluate_every=0)
    found = comparable(tmp_path)
    assert [row["step"] for row in found] == [2, 4, 5, 7, 9, 10]
    assert [row["epoch"] for row in found] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    assert [row["lr"] for row in found] == pytest.approx(
        [0.02 * (1 - (row["step"] - 1) / 10) ** 0.9 for row in found]
    )
    for row in found:
        total = row["loss/square"] + row["loss/absolute"]
        assert row["loss/total"] == pytest.approx(total)


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [7]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7])]
)
def test_evaluations_are_as_often_as_asked_and_at_the_end(
    tmp_path: Path, every: int, expected: list[int]
) -> None:
    run(tmp_path, schedule=schedule(epochs=7), evaluate_every=every)
    assert [row["epoch"] for row in comparable(tmp_path) if "val/score" in row] == expected


def test_iterations_may_end_within_an_epoch(tmp_path: Path) -> None:
    task = Squares()
    run(tmp_path, task, schedule=Schedule(iterations=STEPS + 2))
    assert [row["step"] for row in comparable(tmp_path)] == [STEPS, STEPS + 2]
    assert "val/score" in comparable(tmp_path)[-1]
    assert task.asked == [(0, 0), (1, 0)]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        run(tmp_path / name, seed=seed)
    assert_same_run(tmp_path / "first", tmp_path / "second")
    assert comparable(tmp_path / "first") != comparable(tmp_path / "third")


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_trains_too(tmp_path: Path) -> None:
    for name, precision in (("half", "bf16"), ("full", "fp32")):
        plan = schedule(epochs=1)
        run(tmp_path / name, Squares(random=False), precision=precision, schedule=plan)
    half, full = weights(tmp_path / "half"), weights(tmp_path / "full")
    assert {tensor.dtype for tensor in half.values()} == {torch.float32, torch.int64}
    assert not torch.equal(half["5.weight"], full["5.weight"])
    torch.testing.assert_close(half["5.weight"], full["5.weight"], rtol=0, atol=0.02)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    run(tmp_path, schedule=schedule(epochs=1, momentum=0.0, weight_decay=0.0, clip=1e-4))
    first = Squares().model.state_dict()
    moved = [
        weights(tmp_path)[name] - first[name] for name, _ in Squares().model.named_parameters()
    ]
    length = torch.cat([tensor.flatten() for tensor in moved]).norm()
    assert 0 < length <= 1.01 * STEPS * 0.02 * 1e-4


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    task = Squares()
    frozen = task.model[0].requires_grad_(requires_grad=False).weight.clone()
    run(tmp_path, task)
    assert torch.equal(weights(tmp_path)["0.weight"], frozen)


# What it shows.


def test_a_row_is_a_line(tmp_path: Path) -> None:
    out = StringIO()
    run(tmp_path, out=console(file=out, width=200), schedule=schedule(epochs=2), evaluate_every=2)
    first, second = out.getvalue().splitlines()
    assert first.startswith("epoch   1.00  step      5  lr 2.00e-02  loss ")
    assert "(square " in first
    assert "score" not in first
    assert second.endswith("constant 1.0000")


def test_a_terminal_shows_a_live_bar(tmp_path: Path) -> None:
    out = StringIO()
    run(tmp_path, out=console(file=out, width=200, force_terminal=True))
    assert "15/15" in out.getvalue()


# Going on.


def interrupt(task: Squares, step: int, number: int = signal.SIGTERM) -> None:
    """Sends a signal while the batch of a step is made."""

    def send(current: int) -> None:
        if current == step:
            os.kill(os.getpid(), number)

    task.before_step = send


@pytest.mark.parametrize("step", [0, 1, STEPS - 1, STEPS, 2 * STEPS + 1])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(training, "WINDOW", 3)
    run(tmp_path / "whole")
    task = Squares()
    interrupt(task, step)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "parts", task)
    assert stopped.value.step == step + 1
    assert str(stopped.value).endswith(f"to go on: squares.py --resume {tmp_path / 'parts'}")
    assert read_metrics(tmp_path / "parts") is None
    # What was written after the checkpoint is not to be there twice.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99}\n')
    again = Squares(seed=9)
    run(tmp_path / "parts", again, resume=True)
    # Nothing that was trained on is made again.
    assert again.asked[:1] == [divmod(step + 1, STEPS)]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_a_signal_in_the_last_step_ends_the_program_after_the_result(tmp_path: Path) -> None:
    task = Squares()
    interrupt(task, 3 * STEPS - 1)
    with pytest.raises(Stopped):
        run(tmp_path, task)
    assert read_metrics(tmp_path) is not None
    assert not (tmp_path / "checkpoints").exists()


def test_a_crash_costs_what_was_done_since_the_last_checkpoint(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 2 * STEPS + 2:
            raise OSError("no image")

    run(tmp_path / "whole")
    task = Squares()
    task.before_step = fail
    with pytest.raises(OSError, match="no image") as error:
        run(tmp_path / "parts", task, checkpoint=ALWAYS)
    assert error.value.__notes__ == [f"to go on: squares.py --resume {tmp_path / 'parts'}"]
    again = Squares()
    run(tmp_path / "parts", again, resume=True)
    assert again.asked == [(2, 0)]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# What goes wrong.


class Diverging(Squares):
    """Has a loss that is not a number from a step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._left = step

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        self._left -= 1
        terms = super().losses(batch)
        return terms if self._left > 0 else terms | {"absolute": terms["absolute"] * torch.nan}


def test_nan_stops_the_run_and_names_the_first_step_and_the_term(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, Diverging(3))
    assert str(error.value) == (
        "loss/total, loss/absolute became NaN or infinite in step 3 (of steps 1 to 5, the first); "
        "a lower schedule.lr, a longer warm-up or schedule.clip may help"
    )
    assert read_metrics(tmp_path) is None


def test_nan_names_the_checkpoint_before_it(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="checkpoint from before it, after step 10"):
        run(tmp_path, Diverging(2 * STEPS + 2), checkpoint=ALWAYS)


# Several processes.


def run_part(folder: Path) -> dict[str, float]:
    return run(folder, Squares(random=False, seed=distributed.rank()))


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    with two_processes(tmp_path) as pair:
        first, second = pair(run_part, tmp_path / "two")
    run(tmp_path / "one", Squares(random=False))
    assert first == second == read_metrics(tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    assert len(comparable(tmp_path / "two")) == 3
