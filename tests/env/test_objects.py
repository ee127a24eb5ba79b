"""Whatever a table names may be an object or `module:name`; the kind is checked first."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import pytest
import torch
from torch import Tensor, nn

from mtkd_env.env import EnvSpec, MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.imports import Trust, is_in_memory, is_users, name_of, takes, whole_name
from mtkd_env.networks import build_network, cut_at, has_weights
from mtkd_env.observation import Block
from mtkd_env.registration import assemble
from mtkd_env.reward import RewardRule
from mtkd_env.teachers import TeacherSpec
from mtkd_env.terms import Distillation, TermInputs
from mtkd_env.types import DistillState
from tiny import NUM_ENVS, STEPS_PER_EPOCH, TEACHERS, label, make_tiny_env

M = len(TEACHERS)


def minus_cross_entropy(state: DistillState, distillation: Distillation) -> Tensor:
    return -distillation.alpha * state.teacher_cross_entropy


def confidence(state: DistillState) -> Tensor:
    return state.teachers.logits.softmax(-1).amax(-1).T


def two_of_each(state: DistillState) -> Tensor:
    return torch.stack([state.divergence, -state.divergence], dim=-1)


def squares(inputs: TermInputs) -> Tensor:
    return (inputs.logits - inputs.teachers.logits).square().mean(-1).T


def of_one_sample(state: DistillState, distillation: Distillation | None = None) -> Tensor:
    return (
        state.cross_entropy if distillation is None else distillation.alpha * of_one_sample(state)
    )


class Flat(nn.Module):
    def forward(self, inputs: TermInputs) -> Tensor:
        return inputs.targets


RULE = RewardRule(minus_cross_entropy, "none", needs_label=False)
WIDE = Block(two_of_each, width=2)


def both(name: str) -> list[Any]:
    """An object of this module, and its name."""
    return [getattr(sys.modules[__name__], name), f"{__name__}:{name}"]


def rollout(env: MTKDVectorEnv) -> None:
    env.reset(seed=0)
    env.step(torch.zeros(NUM_ENVS, 2 * M))


# What they do.


@pytest.mark.parametrize("reward", [*both("minus_cross_entropy"), *both("RULE")], ids=label)
def test_a_reward_of_ones_own_pays(reward: Any) -> None:
    env = make_tiny_env(reward=reward, alpha=2.0)
    env.reset(seed=0)
    expected = -2 * env.state.teacher_cross_entropy
    info = env.step(torch.zeros(NUM_ENVS, 2 * M))[-1]
    assert torch.from_numpy(info["teacher_rewards"]).equal(expected)
    assert (info["advantages"] == info["teacher_rewards"]).all() == (reward in both("RULE"))


@pytest.mark.parametrize("block", both("confidence"), ids=label)
def test_a_block_of_ones_own_is_observed_beside_others(block: Any) -> None:
    env = make_tiny_env(observation=["gaps", block, WIDE], normalize_observation=False)
    observation, _ = env.reset(seed=0)
    layout = env.obs_layout
    names = ("similarity", "divergence", "confidence", "two_of_each")
    assert [*layout] == [f"{teacher}/{name}" for teacher in TEACHERS for name in names]
    assert observation.shape == (NUM_ENVS, 5 * M)
    expected = confidence(env.state), two_of_each(env.state)
    for m, teacher in enumerate(TEACHERS):
        own, wide = (torch.from_numpy(observation[:, layout[f"{teacher}/{n}"]]) for n in names[2:])
        assert own.equal(expected[0][:, m : m + 1])
        assert wide.equal(expected[1][:, m])


@pytest.mark.parametrize("term", both("squares"), ids=label)
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_loss_of_ones_own_is_trained_by(term: Any, share: float | None) -> None:
    env = make_tiny_env(logit=term if share is None else {"kd": 1.0, term: share}, feature="none")
    env.reset(seed=0)
    state = env.state
    gap = (state.student.logits - state.teachers.logits).square().mean(-1).T
    expected = gap if share is None else state.divergence + share * gap
    torch.testing.assert_close(state.kd, expected)
    env.distill(env.to_weights(torch.zeros(NUM_ENVS, 2 * M)))


def test_a_feature_loss_of_ones_own_reaches_the_regressors() -> None:
    env = make_tiny_env(
        feature=lambda c: torch.stack([p.square().mean((1, 2, 3)) for p in c.projected], 1)
    )
    env.reset(seed=0)
    before = [one.clone() for one in env.distiller.module.regressors.parameters()]
    for _ in range(STEPS_PER_EPOCH):
        env.step(torch.zeros(NUM_ENVS, 2 * M))
    after = env.distiller.module.regressors.parameters()
    assert not any(one.equal(old) for one, old in zip(after, before, strict=True))


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnvSpec(reward=3), "reward: expected a name or a RewardRule, or a function of"),
        (lambda: EnvSpec(reward=confidence), "reward: expected a name or a RewardRule"),
        (lambda: EnvSpec(reward="builtins:print"), "'builtins:print' is not a RewardRule, or a"),
        (lambda: EnvSpec(reward="papr"), "unknown reward 'papr'; did you mean 'paper'"),
        (lambda: EnvSpec(observation=[]), "observation: expected at least one block"),
        (lambda: EnvSpec(observation=["all", "gaps"]), "there are two blocks 'divergence'"),
        (lambda: EnvSpec(observation=["label_free", "logits"]), "expected 'label_free' alone"),
        (lambda: EnvSpec(observation=["gap"]), "unknown observation 'gap'; did you mean 'gaps'"),
        (lambda: EnvSpec(observation="os:getcwd"), "'os:getcwd' is not a Block, or a function of"),
        (lambda: Distillation(logit=DistillState), "logit: expected a name or a function of Term"),
        (lambda: Distillation(logit={squares: "x"}), "expected float, got 'x'"),
        (lambda: Distillation(feature={"mse": True}), "feature.mse: expected float, got True"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_refused_before_it_is_called(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": of_one_sample}, r"env.reward: expected a tensor of shape \(4, 3\), got \(4,\)"),
        ({"observation": of_one_sample}, r"block 'of_one_sample' of env.observation: expected"),
        ({"logit": Flat()}, "distillation.logit: expected a tensor of shape"),
    ],
)
def test_what_has_another_shape_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rollout(make_tiny_env(**options))


def test_objects_need_labels_unless_they_say_otherwise() -> None:
    for options in ({"reward": minus_cross_entropy}, {"observation": confidence}):
        with pytest.raises(ConfigError, match=r"test_objects:\w+' needs the label of every sample"):
            EnvSpec(**{"reward": "heldout"} | options).resolved(complete=False)
    EnvSpec(reward=RULE, observation=Block(confidence, needs_label=False)).resolved(complete=False)


def test_files_may_name_what_is_trusted_only() -> None:
    with Trust().applied():
        with pytest.raises(ConfigError, match="only with --trust"):
            EnvSpec(reward=f"{__name__}:minus_cross_entropy")
        EnvSpec(reward="mtkd_env.reward:alignment_credit")


# Kinds and names.


def test_functions_are_told_by_what_they_take() -> None:
    assert takes(2)(minus_cross_entropy)
    assert takes(1)(partial(minus_cross_entropy, None))
    for other in (confidence, print, dict, 3, os.path.join, assert_never):
        assert not takes(2)(other)


def test_functions_of_libraries_are_not_the_users() -> None:
    assert is_users(confidence)
    assert not any(map(is_users, (print, sys.exit, torch.load, pytest, 3)))


def test_names_bring_their_objects_back_or_say_that_they_do_not() -> None:
    assert name_of("paper") == "paper"
    assert name_of(confidence) == f"{__name__}:confidence"
    assert name_of(DistillState) == "mtkd_env.types:DistillState"
    for found in (lambda state: state, RULE, partial(confidence)):
        assert is_in_memory(name_of(found))
    with pytest.raises(ConfigError, match="was in the memory of the program that made the run"):
        EnvSpec(reward=name_of(partial(minus_cross_entropy)))


class Small(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(in_channels, 4, 3, stride=2)
        self.classifier = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images).relu().mean((2, 3)))


def test_networks_may_be_objects() -> None:
    teacher, student = Small(10, 1), Small(10, 1)
    assembly = assemble(
        data={"train_size": 64, "batch_size": 16},
        teachers=[{"network": cut_at(teacher, "body"), "name": "mine"}],
        student={"network": cut_at(student, "body")},
        device="cpu",
    )
    assert assembly.pool.ensemble.names == ("mine",)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        said = assembly.pool.ensemble(images).logits[0]
    torch.testing.assert_close(said, teacher.eval()(images))
    env = assembly.env
    for seed in (1, 2):  # Every student begins with the weights that were given.
        env.reset(seed=seed)
        found = [one.detach() for one in env.distiller.student.parameters()]
        assert all(a.equal(b) for a, b in zip(found, student.parameters(), strict=True))
        env.step(env.action_space.sample())


def test_a_class_is_made_anew_by_every_seed() -> None:
    build = partial(build_network, cut_at(Small, "body"), num_classes=3, in_channels=1)
    first, again, other = (next(build(seed=seed).parameters()) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_factory_of_any_keyword_is_told_the_classes() -> None:
    def factory(**keywords: Any) -> nn.Module:
        return Small(**{"in_channels": 3} | keywords)

    for channels in (1, 3):
        made = build_network(cut_at(factory, "body"), num_classes=5, in_channels=channels)
        assert made(torch.rand(2, channels, 8, 8)).logits.shape == (2, 5)
    with pytest.raises(ConfigError, match=r"cannot be made: .*unexpected keyword argument 'depth'"):
        build_network(cut_at(factory, "body"), num_classes=5, depth=8)


def test_a_name_may_be_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "of_a_file.py"
    path.write_text("def reward(state, distillation):\n    return 0\n")
    named = f"{path}:reward"
    assert EnvSpec(reward=named).reward == named
    assert whole_name(f"{path.name}:reward@x") == f"{Path.cwd() / path.name}:reward@x"
    broken = tmp_path / "broken_file.py"
    broken.write_text("1 / 0")
    for name, message in {
        f"{tmp_path}/other.py:reward": "reward: cannot load '.*other.py:reward': no such file",
        f"{broken}:reward": "ZeroDivisionError: division by zero",
        f"{path}:rewart": "has no attribute 'rewart'; did you mean 'reward'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            EnvSpec(reward=name)
    namesake = tmp_path / "other" / path.name
    namesake.parent.mkdir()
    namesake.write_text("")
    with pytest.raises(ConfigError, match="the module of_a_file is another file"):
        EnvSpec(reward=f"{namesake}:reward")


def test_modules_that_are_made_are_told_from_classes() -> None:
    assert has_weights(Small(2, 1))
    assert has_weights(cut_at(Small(2, 1), "body"))
    assert not any(map(has_weights, (Small, cut_at(Small, "body"), "resnet8")))
    with pytest.raises(ConfigError, match="network: a module that has been made cannot be random"):
        TeacherSpec(Small(2, 1), kind="random")
    with pytest.raises(ConfigError, match=r"is no mtkd_env\.networks\.Network.*or by .*cut_at"):
        build_network(Small, num_classes=3, in_channels=1)
