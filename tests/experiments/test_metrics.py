import json
from dataclasses import astuple, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from agents import PolicyGradient, Uniform
from experiments.metrics import (
    PARTITION,
    TOGETHER,
    EpochMeter,
    fusion_coefficients,
)
from experiments.running.finite import HINT, FiniteWatch, check_row
from experiments.running.log import ROWS, MetricsLog, read_rows
from experiments.training import BREAKDOWN
from known_optimum import STEPS, started_env
from mtkd_env.action import WeightFusion
from mtkd_env.keeping import check_module
from mtkd_env.reward import Rewards, minmax_center
from mtkd_env.types import LossTerms, TeacherWeights
from mtkd_env.vector import StepRecord
from tiny import CLASSES, TEACHERS

LINES = (ROWS, BREAKDOWN)

NAMES = tuple(TEACHERS)
M = len(NAMES)


def record(weights: Any, rewards: Any, feature_weights: Any = None) -> StepRecord:
    """A step with weights and rewards given by hand; its losses are zero."""
    logit, teacher = torch.tensor(weights), torch.tensor(rewards)
    feature = logit if feature_weights is None else torch.tensor(feature_weights)
    zeros = torch.zeros(len(logit))
    advantages = minmax_center(teacher)
    return StepRecord(
        step=0,
        weights=TeacherWeights(logit, feature),
        losses=LossTerms(zeros, torch.zeros_like(logit), torch.zeros_like(logit), zeros),
        rewards=Rewards(teacher, advantages, zeros),
        index=torch.arange(len(logit)),
        targets=torch.zeros(len(logit), dtype=torch.int64),
        correct=torch.ones(logit.shape, dtype=torch.bool),
    )


def scores_of(*records: StepRecord) -> dict[str, float]:
    meter = EpochMeter([f"t{m}" for m in range(records[0].weights.logit.shape[1])], 1)
    for each in records:
        meter(each)
    return {name: value for name, value in meter.read()[0].items() if name.startswith("score")}


# The agent score.


def test_agent_score_by_hand() -> None:
    # Rescaled (0, 0.5, 1) and (1, 0, 0), centred (-½, 0, ½) and (⅔, -⅓, -⅓): the oracle's mean
    # advantage is (½ + ⅔) / 2 = 7/12.
    rewards = [[-4.0, -3.0, -2.0], [5.0, 1.0, 1.0]]
    logit = [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]  # (½ - ⅓) / 2 = 1/12
    feature = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]  # (-½ + ⅔) / 2 = 1/12
    found = scores_of(record(logit, rewards, feature))
    assert found == pytest.approx({"score": 1 / 7, "score/logit": 1 / 7, "score/feature": 1 / 7})
    feature = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    found = scores_of(record(logit, rewards, feature))
    assert found == pytest.approx({"score": 4 / 7, "score/logit": 1 / 7, "score/feature": 1})


def test_agent_score_is_0_for_equal_weights_and_1_for_the_best_teachers() -> None:
    rewards = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    best = torch.nn.functional.one_hot(rewards.argmax(1)).float().tolist()
    worst = torch.nn.functional.one_hot(rewards.argmin(1)).float().tolist()
    uniform = [[1 / 3] * 3] * 5
    assert scores_of(record(best, rewards.tolist()))["score"] == pytest.approx(1)
    assert scores_of(record(uniform, rewards.tolist()))["score"] == pytest.approx(0, abs=1e-6)
    assert scores_of(record(worst, rewards.tolist()))["score"] < 0


def test_agent_score_is_that_of_all_steps_together() -> None:
    # A ratio of sums, not a mean of ratios.
    good = record([[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]])  # ⅔ of ⅔
    bad = record([[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]])  # -⅔ of ⅓
    assert scores_of(good, bad)["score"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "rewards"), [([[1.0]], [[-3.0]]), ([[0.5, 0.5]], [[2.0, 2.0]])]
)
def test_agent_score_is_0_where_teachers_cannot_be_told_apart(weights: Any, rewards: Any) -> None:
    assert set(scores_of(record(weights, rewards)).values()) == {0}


@pytest.mark.parametrize("reward", ["paper", "aggregate", "reference", "alignment"])
def test_agent_score_means_the_same_whatever_the_agent_is_paid_by(reward: str) -> None:
    env = started_env(reward=reward)
    records: list[StepRecord] = []
    meter = EpochMeter(NAMES, CLASSES)
    env.subscribe(records.append)
    env.subscribe(meter)
    PolicyGradient(env).learn(1, lambda: None)
    advantages = torch.cat([minmax_center(each.rewards.teacher) for each in records])
    weights = torch.cat([each.weights.logit for each in records])
    expected = (weights * advantages).sum(1).mean() / advantages.max(1).values.mean()
    assert meter.read()[0]["score/logit"] == pytest.approx(float(expected), abs=1e-6)


# The meter.


def mean(tensors: list[Tensor]) -> Any:
    return np.stack([tensor.double().numpy() for tensor in tensors]).mean((0, 1))


def test_means_are_those_of_all_samples() -> None:
    env = started_env(fusion="learnable")
    records: list[StepRecord] = []
    meter = EpochMeter(NAMES, CLASSES)
    env.subscribe(records.append)
    env.subscribe(meter)
    PolicyGradient(env).learn(1, lambda: None)
    assert meter.steps == STEPS
    found = meter.read()[0]
    losses = [each.losses for each in records]
    expected = {
        "loss/total": mean([each.total for each in losses]),
        "loss/cross_entropy": mean([each.cross_entropy for each in losses]),
        "loss/kd": mean([each.kd for each in losses]).mean(),
        "loss/feature": mean([each.feature for each in losses]).mean(),
        "reward": mean([each.rewards.scalar for each in records]),
    }
    per_teacher = {
        "weights/logit": mean([each.weights.logit for each in records]),
        "weights/feature": mean([each.weights.feature for each in records]),
        "teacher_rewards": mean([each.rewards.teacher for each in records]),
    }
    for name, values in per_teacher.items():
        expected |= {f"{name}/{teacher}": v for teacher, v in zip(NAMES, values, strict=True)}
    for part in ("total", "generator", "confidence", "divergence"):
        weights = [
            each.weights if part == "total" else each.weights.parts[part] for each in records
        ]
        for head in ("logit", "feature"):
            rows = [getattr(each, head).double() for each in weights]
            expected[f"entropy/{part}/{head}"] = mean([-(r * r.log()).sum(1) for r in rows])
    scores = {"score", "score/logit", "score/feature"}
    assert found.keys() == expected.keys() | scores
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_names_are_unique_and_none_is_private() -> None:
    env = started_env()
    meter = EpochMeter(NAMES, CLASSES)
    env.subscribe(meter)
    Uniform(env).warm_up(1)
    sums = {n: v for n, v in meter.take().items() if not n.startswith(PARTITION)}
    Uniform(env).warm_up(1)
    found = meter.read()[0]
    private = [name for name in sums if name.startswith("_")]
    assert len(found) == sum(value.numel() for value in sums.values()) - len(private) + 3
    assert not any(name.startswith("_") for name in found)
    added_by_a_run = {"epoch", "lr", "seconds", "test/accuracy", "val/accuracy"}
    assert not added_by_a_run & found.keys()


def test_reading_starts_over() -> None:
    meter = EpochMeter(["a", "b"], 1)
    meter(record([[1.0, 0.0]], [[1.0, 0.0]]))
    meter(record([[1.0, 0.0]], [[1.0, 0.0]]))
    assert meter.read()[0]["weights/logit/a"] == 1
    assert meter.steps == 0
    meter(record([[0.0, 1.0]], [[1.0, 0.0]]))
    found = meter.read()[0]
    assert (found["weights/logit/a"], found["weights/logit/b"]) == (0, 1)
    assert found["teacher_rewards/a"] == 1


def test_metrics_keep_no_graph() -> None:
    learnt_records(meter := EpochMeter(NAMES, CLASSES))
    assert not any(value.requires_grad for value in meter.take().values())


@pytest.mark.parametrize("after", [1, TOGETHER, TOGETHER + 1])
def test_a_meter_goes_on_bit_for_bit_wherever_it_was_interrupted(after: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    steps = [
        record(*torch.rand(2, 5, M, generator=numbers).tolist()) for _ in range(2 * TOGETHER + 3)
    ]
    whole, first, second = (EpochMeter(NAMES, CLASSES) for _ in range(3))
    for each in steps:
        whole(each)
    for each in steps[:after]:
        first(each)
    second.load_state_dict(first.state_dict(), "cpu")
    for each in steps[after:]:
        second(each)
    assert second.read() == whole.read()


# What the mean weights are made of.


def learnt_records(meter: EpochMeter | None = None) -> list[StepRecord]:
    """All steps of an epoch in which an agent learns."""
    env = started_env()
    records: list[StepRecord] = []
    env.subscribe(records.append)
    if meter is not None:
        env.subscribe(meter)
    PolicyGradient(env).learn(1, lambda: None)
    return records


def test_a_step_says_which_teachers_are_right() -> None:
    env = started_env()
    state = env.state
    made = env.distill(TeacherWeights.uniform(state.divergence))
    assert made.targets.equal(state.batch.targets)
    for m in range(M):
        for i, target in enumerate(state.batch.targets.tolist()):
            assert bool(made.correct[i, m]) == (int(state.teachers.logits[m, i].argmax()) == target)
    assert 0 < made.correct.float().mean() < 1


def test_breakdown_by_hand() -> None:
    meter = EpochMeter(["a", "b"], 3)
    for weights, targets, correct in (
        ([[0.25, 0.75], [0.5, 0.5]], [2, 0], [[True, True], [False, True]]),
        ([[1.0, 0.0]], [2], [[True, True]]),
    ):
        count = len(targets)
        made = record(weights, [[0.0, 1.0]] * count, [[0.5, 0.5]] * count)
        meter(replace(made, targets=torch.tensor(targets), correct=torch.tensor(correct)))
    assert meter.read()[1] == {
        "teachers": ["a", "b"],
        "class": {
            "count": [1, 0, 2],
            "logit": [[0.5, 0.5], [None, None], [0.625, 0.375]],
            "feature": [[0.5, 0.5], [None, None], [0.5, 0.5]],
        },
        "right": {"count": [2, 3], "logit": [0.625, 0.416667], "feature": [0.5, 0.5]},
        "wrong": {"count": [1, 0], "logit": [0.5, None], "feature": [0.5, None]},
    }


def test_a_breakdown_starts_over_and_is_json() -> None:
    meter = EpochMeter(["a", "b"], 1)
    meter(record([[1.0, 0.0]], [[1.0, 0.0]]))
    assert json.loads(json.dumps(meter.read()[1]))["class"]["logit"] == [[1, 0]]
    meter(record([[0.0, 1.0]], [[1.0, 0.0]]))
    assert meter.read()[1]["class"] == {"count": [1], "logit": [[0, 1]], "feature": [[0, 1]]}


@pytest.mark.gpu
def test_meters_do_not_wait_for_the_device() -> None:
    made = learnt_records()[0].whole()
    on_device = replace(
        made,
        weights=TeacherWeights(made.weights.logit.cuda(), made.weights.feature.cuda()),
        losses=LossTerms(*(terms.cuda() for terms in astuple(made.losses))),
        rewards=Rewards(*(rewards.cuda() for rewards in astuple(made.rewards))),
        targets=made.targets.cuda(),
        correct=made.correct.cuda(),
    )
    meter = EpochMeter(NAMES, CLASSES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter(on_device)
        meter(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(meter.read()[1]["class"]["count"]) == 2 * len(made.targets)


def test_coefficients_of_the_fusion_are_logged_where_they_are_learnt() -> None:
    assert fusion_coefficients(WeightFusion("paper")) == {}
    fusion = WeightFusion("learnable")
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]).log())
    assert fusion_coefficients(fusion) == pytest.approx(
        {
            "fusion/logit/generator": 1 / 8,
            "fusion/logit/confidence": 2 / 8,
            "fusion/logit/divergence": 5 / 8,
            "fusion/feature/generator": 1 / 4,
            "fusion/feature/confidence": 1 / 4,
            "fusion/feature/divergence": 2 / 4,
        }
    )


# The log.


def rows_of_a_run(folder: Path, epochs: int = 3) -> list[dict[str, Any]]:
    env = started_env()
    meter = EpochMeter(NAMES, CLASSES)
    env.subscribe(meter)
    with MetricsLog(folder, None, LINES, "epoch") as log:
        for epoch in range(1, epochs + 1):
            Uniform(env).warm_up(STEPS)
            log.write({"epoch": epoch, "lr": 0.1, **meter.read()[0]})
            # A row is there as soon as its epoch has ended.
            assert read_rows(folder) == log.rows
    return log.rows


def test_rows_are_written_as_they_are(tmp_path: Path) -> None:
    rows = rows_of_a_run(tmp_path)
    assert read_rows(tmp_path) == rows
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_breakdowns_are_written_to_a_file_of_their_own(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None, LINES, "epoch") as log:
        log.write_line(BREAKDOWN, {"epoch": 1, "class": {"logit": [[None]]}})
        assert read_rows(tmp_path, "breakdown.jsonl") == [
            {"epoch": 1, "class": {"logit": [[None]]}}
        ]
    assert read_rows(tmp_path) == []


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    rows = rows_of_a_run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == rows[0].keys()
    for name in rows[0]:
        found = events.Scalars(name)
        assert [event.step for event in found] == [1, 2, 3]
        values = np.array([row[name] for row in rows], np.float32)
        assert [event.value for event in found] == values.tolist()


# What is not finite.


def steps_of(env_record: StepRecord, count: int) -> list[StepRecord]:
    return [replace(env_record, step=step) for step in range(count)]


def spoiled(step: StepRecord, part: str, name: str, value: float, row: int) -> StepRecord:
    """The step with one number replaced; its samples are 10, 11, ..."""
    owner = getattr(step, part)
    tensor = getattr(owner, name).clone()
    tensor.view(len(tensor), -1)[row, 0] = value
    index = 10 + torch.arange(len(tensor))
    return replace(step, index=index, **{part: replace(owner, **{name: tensor})})


PLAIN = record([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
SPOILED = {
    "loss/cross_entropy": ("losses", "cross_entropy"),
    "loss/kd": ("losses", "kd"),
    "loss/feature": ("losses", "feature"),
    "loss/total": ("losses", "total"),
    "weights/logit": ("weights", "logit"),
    "weights/feature": ("weights", "feature"),
    "teacher_rewards": ("rewards", "teacher"),
    "reward": ("rewards", "scalar"),
}


@pytest.mark.parametrize(("term", "value"), [*zip(SPOILED, cycle([float("nan"), float("inf")]))])
def test_the_first_bad_step_is_named_with_its_term_and_samples(term: str, value: float) -> None:
    part, name = SPOILED[term]
    watch = FiniteWatch()
    for step in steps_of(PLAIN, 5):
        watch(spoiled(step, part, name, value, row=step.step - 2) if step.step > 2 else step)
    message = (
        rf"^{term} became NaN or infinite in step 4 \(of steps 1 to 5, the first\) for sample 11 "
        "of 3 samples; a lower optimizer.lr"
    )
    with pytest.raises(FloatingPointError, match=message):
        watch.check()
    # It has been told.
    watch.check()


def test_all_bad_terms_are_named_and_some_of_the_samples() -> None:
    weights, rewards = [[0.5, 0.5]] * 20, [[1.0, 2.0]] * 20
    bad = record(weights, rewards)
    nan = torch.full((20,), float("nan"))
    watch = FiniteWatch()
    watch(replace(bad, losses=replace(bad.losses, cross_entropy=nan, total=nan)))
    message = (
        r"^loss/cross_entropy, loss/total became .* sample 0, 1, 2, 3, 4, 5, 6, 7 and 12 more of 20"
    )
    with pytest.raises(FloatingPointError, match=message):
        watch.check()


def test_a_window_is_checked_when_it_is_full() -> None:
    watch = FiniteWatch(window=3)
    bad = spoiled(PLAIN, "losses", "total", float("nan"), row=0)
    watch(bad)
    watch(PLAIN)
    with pytest.raises(FloatingPointError, match="in step 1 "):
        watch(PLAIN)


def test_finite_steps_pass() -> None:
    watch = FiniteWatch(window=2)
    watch.check()
    for step in steps_of(PLAIN, 5):
        watch(step)
    watch.check()


def test_parameters_and_running_statistics_are_checked() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    check_module(module, 3, HINT)
    module[1].running_var[0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"^1.running_var became .* by step 3; a lower"):
        check_module(module, 3, HINT)


def test_a_bad_value_of_a_row_is_named() -> None:
    check_row({"epoch": 2, "lr": 0.1}, 8)
    message = r"^test/accuracy became NaN or infinite in epoch 2 \(up to step 8\); a lower"
    with pytest.raises(FloatingPointError, match=message):
        check_row({"epoch": 2, "lr": 0.1, "test/accuracy": float("nan")}, 8)


# Going on.


def test_a_log_goes_on_from_its_state(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "loss": 1 / epoch} for epoch in range(1, 6)]
    with MetricsLog(tmp_path, None, LINES, "epoch") as log:
        for row in rows[:2]:
            log.write(row)
            log.write_line(BREAKDOWN, row)
        state = log.state_dict()
        log.write(rows[2])
    with (tmp_path / "breakdown.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 3, "lo')
    with MetricsLog(tmp_path, state, LINES, "epoch") as log:
        assert log.rows == rows[:2]
        for row in rows[2:]:
            log.write(row)
            log.write_line(BREAKDOWN, row)
    assert read_rows(tmp_path) == read_rows(tmp_path, "breakdown.jsonl") == rows
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
