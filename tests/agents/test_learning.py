"""What holds for every learning agent, most of it of our own ones alone."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import AGENTS, build_agent, check_agent
from agents.policy_gradient import LearningAgent
from known_optimum import (
    STEPS,
    advantages_of,
    ignore,
    knowing,
    known_env,
    scores,
    specialists_env,
    started_env,
    the_surest,
)
from mtkd_env.action import generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint, save_checkpoint
from mtkd_env.seeding import RandomNumbers
from mtkd_env.types import TeacherWeights
from tiny import NUM_ENVS, seldom

# Every kind, so that each part that can be saved is.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pg": ("pg", {}),
    "pg clipped": ("pg", {"loss": "clipped", "passes": 2}),
    "reinforce categorical": ("reinforce", {"distribution": "categorical"}),
    "reinforce dirichlet": ("reinforce", {"distribution": "dirichlet"}),
    "reinforce gaussian": ("reinforce", {"distribution": "gaussian", "optimizer": "sgd"}),
    "dpg": ("dpg", {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, env: Any = None, seed: int = 0) -> LearningAgent[Any]:
    name, arguments = KINDS[kind]
    return build_agent(name, env or started_env(), seed=seed, arguments=arguments)


def fused_env(kind: str) -> MTKDVectorEnv:
    """With a fusion that could learn, where the kind of agent allows it."""
    return started_env(fusion="paper" if "clipped" in kind else "learnable")


def tensors(state: Any) -> list[Tensor]:
    """All tensors and numbers of a state, in its order."""
    if isinstance(state, Mapping):
        return [leaf for value in state.values() for leaf in tensors(value)]
    if isinstance(state, list | tuple):
        return [leaf for value in state for leaf in tensors(value)]
    return [torch.as_tensor(state)] if isinstance(state, Tensor | int | float) else []


def equal(first: Any, second: Any) -> bool:
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_every_learning_agent_is_listed() -> None:
    learning = {
        name
        for name, agent in AGENTS.items()
        if isinstance(agent, type) and issubclass(agent, LearningAgent)
    }
    assert {name for name, _ in KINDS.values()} == learning


@every_kind
def test_an_agent_goes_on_exactly_from_its_state(kind: str, tmp_path: Path) -> None:
    envs = started_env(), started_env()
    first, second = make(kind, envs[0], seed=0), make(kind, envs[1], seed=1)
    first.learn(2, ignore)
    save_checkpoint(tmp_path / "state.pt", first.state_dict())
    envs[1].load_state_dict(deepcopy(envs[0].state_dict()))
    assert not equal(first.state_dict(), second.state_dict())
    second.load_state_dict(load_checkpoint(tmp_path / "state.pt"))
    for agent in (first, second):
        agent.learn(2, ignore)
    assert len(tensors(first.state_dict())) > len(list(first.policy.parameters()))
    assert equal(first.state_dict(), second.state_dict())
    students = [env.distiller.student.state_dict() for env in envs]
    assert equal(*students)


@every_kind
def test_the_seed_decides_everything(kind: str) -> None:
    states = []
    for seed in (0, 0, 1):
        agent = make(kind, seed=seed)
        torch.rand(3)  # whatever others draw
        agent.learn(1, ignore)
        student = agent.env.distiller.student.state_dict()
        states.append([deepcopy(agent.state_dict()), deepcopy(student)])
    assert equal(states[0], states[1])
    assert not equal(states[0][0], states[2][0])


@every_kind
def test_the_global_generator_is_left_alone(kind: str) -> None:
    env = started_env()
    before = torch.random.get_rng_state()
    make(kind, env).learn(1, ignore)
    assert torch.random.get_rng_state().equal(before)


@every_kind
def test_all_parts_that_are_saved_but_constants_change(kind: str) -> None:
    agent = make(kind)
    before = deepcopy(agent.state_dict())
    agent.learn(1, ignore)
    after = agent.state_dict()
    assert set(after) == set(before)
    for name in set(after) - {"history"}:
        if tensors(after[name]):
            same = len(tensors(after[name])) == len(tensors(before[name]))
            plain = "optimizer" in name and KINDS[kind][1].get("optimizer") == "sgd"
            assert plain or not (same and equal(after[name], before[name])), name


@every_kind
def test_updates_of_the_policy_are_counted(kind: str) -> None:
    env = started_env()
    agent = make(kind, env)
    assert agent.updates == 0
    agent.learn(2, ignore)
    expected = {"pg": 2 * STEPS, "pg clipped": 4 * STEPS, "dpg": 8 * STEPS}
    assert agent.updates == expected.get(kind, 2 * STEPS)
    other = make(kind, started_env())
    other.load_state_dict(agent.state_dict())
    assert other.updates == agent.updates
    other.learn(1, ignore)
    assert other.updates == agent.updates * 3 // 2


@every_kind
def test_agent_steps_leave_the_student_alone(kind: str) -> None:
    env = started_env()
    agent = make(kind, env)
    agent.history.add(agent.collect())
    module = env.distiller.module
    module.zero_grad(set_to_none=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    agent.update()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert equal(module.state_dict(), before)


@every_kind
def test_student_steps_leave_the_agent_alone(kind: str) -> None:
    env = fused_env(kind)
    agent = make(kind, env)
    agent.collect()
    trained = [*agent.policy.parameters(), *env.fusion.parameters()]
    assert all(parameter.grad is None for parameter in trained)


@every_kind
def test_half_precision_observations_are_enough(kind: str) -> None:
    agent = make(kind, started_env(observation_dtype="float16"))
    agent.learn(1, ignore)
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())


@every_kind
def test_a_single_teacher_has_all_the_weight(kind: str) -> None:
    env = started_env(count=1)
    agent = make(kind, env)
    executed: list[TeacherWeights] = []
    env.subscribe(lambda record: executed.append(record.weights))
    assert scores(agent, 2)[-1] == 0
    for found in executed:
        torch.testing.assert_close(found.logit, torch.ones(NUM_ENVS, 1))
        torch.testing.assert_close(found.feature, torch.ones(NUM_ENVS, 1))
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())


@every_kind
def test_histories_hold_no_graph(kind: str) -> None:
    def leaves(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, Mapping):
            return [leaf for part in value.values() for leaf in leaves(part)]
        return [leaf for name in value.__slots__ for leaf in leaves(getattr(value, name))]

    memory = make(kind, fused_env(kind)).collect()
    assert len(leaves(memory)) >= 2
    assert not any(tensor.requires_grad for tensor in leaves(memory))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("pg")])
@pytest.mark.parametrize("fusion", ["paper", "generator"])
def test_what_is_remembered_was_generated_not_fused(kind: str, fusion: str) -> None:
    env = started_env(fusion=fusion)
    agent = make(kind, env)
    executed: list[TeacherWeights] = []
    env.subscribe(lambda record: executed.append(record.weights))
    memory = agent.collect()
    generated = executed[0].parts["generator"]
    kept = {
        "dpg": lambda: memory.weights.logit,
        "reinforce": lambda: (
            agent.distribution.action(agent.policy(env.recall(memory.observation)), memory.choice)
            .detach()
            .chunk(2, dim=1)[0]
            .softmax(1)
        ),
    }[KINDS[kind][0]]()
    torch.testing.assert_close(kept, generated.logit)
    assert (fusion == "generator") == torch.allclose(kept, executed[0].logit)


# The fusion is the environment's.


@pytest.mark.parametrize("kind", ["reinforce categorical", "reinforce gaussian", "dpg"])
def test_agents_that_see_the_scalar_reward_leave_the_fusion_as_it_is(kind: str) -> None:
    env = started_env(fusion="learnable")
    before = env.fusion.coefficients.detach().clone()
    make(kind, env).learn(2, ignore)
    assert env.fusion.coefficients.equal(before)
    assert env.fusion.logits.grad is None


# History.


@pytest.mark.parametrize(
    ("agent_every", "lengths"),
    [(None, [3]), (1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (7, [3])],
    ids=str,
)
@pytest.mark.parametrize("name", ["pg", "reinforce", "dpg"])
def test_the_history_is_emptied_when_it_is_full_and_when_the_epoch_ends(
    name: str, agent_every: int | None, lengths: list[int]
) -> None:
    agent = build_agent(name, started_env(), seed=0, arguments={"agent_every": agent_every})
    found: list[int] = []
    agent.learn_from = lambda history: found.append(len(history))
    agent.learn(2, ignore)
    assert sum(lengths) == STEPS
    assert found == 2 * lengths


# Known optima.

# Arguments by which a kind finds the best teacher of every sample, epochs, and the score.
OPTIMA: dict[str, tuple[dict[str, Any], int, float]] = {
    "pg": ({"lr": 1e-2}, 10, 0.9),
    "pg clipped": ({"lr": 1e-2, "passes": 4}, 10, 0.95),
    "reinforce categorical": ({"lr": 3e-3}, 15, 0.8),
    "reinforce dirichlet": ({"lr": 3e-3}, 15, 0.8),
    "reinforce gaussian": ({"lr": 3e-3, "optimizer": "adam"}, 15, 0.8),
    "dpg": ({"lr": 3e-3, "critic_lr": 3e-3}, 10, 0.85),
}
OFTEN = {"pg", "pg clipped", "reinforce categorical", "dpg"}


@pytest.mark.parametrize("kind", seldom(KINDS, OFTEN))
def test_an_agent_finds_the_best_teacher_of_every_sample(kind: str) -> None:
    env = known_env(the_surest, num_envs=16, steps=10)
    advantages = advantages_of(env)
    changes, epochs, least = OPTIMA[kind]
    name, arguments = KINDS[kind]
    found = scores(build_agent(name, env, seed=0, arguments=arguments | changes), epochs)
    known = advantages()
    # No teacher alone would do.
    assert known.mean(0).max() / known.max(1).values.mean() < 0.3
    assert found[-1] > least


@pytest.mark.parametrize(("name", "epochs"), [("reinforce", 20), ("dpg", 10)])
def test_an_entropy_bonus_keeps_weights_away_from_the_corners(name: str, epochs: int) -> None:
    sharpness = []
    for coefficient in (0.0, 1.0):
        arguments = {"lr": 1e-2, "entropy_coef": coefficient}
        agent = build_agent(name, known_env(), seed=0, arguments=arguments)
        agent.learn(epochs, ignore)
        weights = generated_weights(agent.act(agent.env.observation))
        sharpness.append(weights.logit.max(1).values.mean())
    assert sharpness[1] < 0.75 < 0.9 < sharpness[0]


# Teachers that know different classes, of which the agent sees no label.

LEARNERS: dict[str, dict[str, Any]] = {
    "pg": {},
    "reinforce": {},
    "dpg": {},
    "ppo": {"n_steps": 5, "n_minibatches": 2, "n_epochs": 4, "gamma": 0.0, "learning_rate": 3e-3},
}


@pytest.mark.parametrize(
    "name",
    seldom(LEARNERS, {"pg"}),
)
def test_without_labels_agents_ask_the_teacher_that_knows_the_class(name: str) -> None:
    env = specialists_env()
    assert env.state.batch.labelled.float().mean() < 0.25
    advantages = advantages_of(env)
    agent = build_agent(name, env, seed=1, arguments=LEARNERS[name])
    found = scores(agent, 12)
    assert abs(found[0]) < 0.5
    assert found[-1] > 0.9
    asked = env.to_weights(agent.act(env.observation)).logit.argmax(1)
    assert asked.equal(knowing(env))
    # No teacher alone would do.
    known = advantages()
    assert known.mean(0).max() / known.max(1).values.mean() < 0.5


# Small parts.


def test_random_numbers_go_on_from_their_state() -> None:
    numbers = RandomNumbers(3)
    state = deepcopy(numbers.state_dict())
    first = torch.rand(NUM_ENVS, generator=numbers.generator)
    other = RandomNumbers(4)
    assert not torch.rand(NUM_ENVS, generator=other.generator).equal(first)
    other.load_state_dict(state)
    assert torch.rand(NUM_ENVS, generator=other.generator).equal(first)


@pytest.mark.parametrize("name", ["pg", "reinforce", "dpg"])
@pytest.mark.parametrize("count", ["hidden", "agent_every", "history_bytes"])
def test_counts_below_1_are_refused(name: str, count: str) -> None:
    with pytest.raises(ConfigError, match=f"^{count}: expected at least 1, got 0$"):
        AGENTS[name](started_env(), **{count: 0})


# Arguments, checked before anything is built.

NAN, INFINITY = float("nan"), float("inf")

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("pg", {"lr": "x"}, "lr: expected float, got 'x'"),
    ("pg", {"lr": True}, "lr: expected float, got True"),
    ("pg", {"lr": -1}, "lr: expected a finite number >= 0, got -1"),
    ("pg", {"lr": NAN}, "lr: expected a finite number >= 0, got nan"),
    ("pg", {"entropy_coef": -0.1}, "entropy_coef: expected a finite number >= 0, got -0.1"),
    ("pg", {"entropy_coef": INFINITY}, "entropy_coef: expected a finite number >= 0, got inf"),
    ("pg", {"clip_range": 0}, "clip_range: expected a finite number > 0, got 0"),
    ("pg", {"passes": 1.5}, "passes: expected int, got 1.5"),
    ("pg", {"passes": None}, "passes: expected int, got None"),
    ("pg", {"passes": 0}, "passes: expected at least 1, got 0"),
    ("dpg", {"passes": 0}, "passes: expected at least 1, got 0"),
    ("dpg", {"gamma": 0.9}, "gamma: unknown key"),
    ("reinforce", {"passes": 2}, "passes: unknown key"),
    ("pg", {"agent_every": 0}, "agent_every: expected at least 1, got 0"),
    ("pg", {"agent_every": "all"}, "agent_every: expected int or None, got 'all'"),
    ("pg", {"history_bytes": 0}, "history_bytes: expected at least 1, got 0"),
    ("pg", {"history_bytes": "64 MiB"}, "history_bytes: expected int, got '64 MiB'"),
    ("pg", {"optimizer": 3}, "optimizer: expected str, got 3"),
    ("pg", {"optimizer": "adm"}, "optimizer: unknown name 'adm'; did you mean 'adam'"),
    ("pg", {"loss": "clippd"}, "loss: unknown name 'clippd'; did you mean 'clipped'"),
    ("reinforce", {"entropy_coef": -1.0}, "entropy_coef: expected a finite number >= 0, got -1.0"),
    ("reinforce", {"baseline_decay": 1.0}, "baseline_decay: expected a number in [0, 1), got 1.0"),
    (
        "reinforce",
        {"baseline": "mean"},
        "baseline: unknown name 'mean'; did you mean 'running_mean'",
    ),
    ("reinforce", {"distribution": "gauss"}, "distribution: unknown name 'gauss'; did you mean"),
    ("reinforce", {"normalize_advantage": 1}, "normalize_advantage: expected bool, got 1"),
    ("dpg", {"critic_lr": -1e-3}, "critic_lr: expected a finite number >= 0, got -0.001"),
    ("dpg", {"noise_std": -1.0}, "noise_std: expected a finite number >= 0, got -1.0"),
    ("dpg", {"entropy_coef": -0.02}, "entropy_coef: expected a finite number >= 0, got -0.02"),
    ("oracle", {"temperature": 0}, "temperature: expected a finite number > 0, got 0"),
    ("oracle", {"temperature": "warm"}, "temperature: expected float, got 'warm'"),
    ("camkd", {"weight_norm": 2}, "weight_norm: expected str, got 2"),
    ("mmkd", {"buffer_size": 1.5}, "buffer_size: expected int, got 1.5"),
    ("ppo", {"noise_std": "much"}, "noise_std: expected float or None, got 'much'"),
    ("ppo", {"n_minibatches": 2.5}, "n_minibatches: expected int or None, got 2.5"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED, ids=str)
def test_values_that_cannot_be_used_are_refused_before_anything_is_built(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_agent(name, arguments)
    assert str(error.value).startswith(f"agent.arguments.{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pg", {"lr": 1, "entropy_coef": 0, "agent_every": None, "history_bytes": 1}),
        ("reinforce", {"baseline_decay": 0, "agent_every": 10**6}),
        ("dpg", {"noise_std": 0, "critic_lr": 0.0}),
        ("uniform", {}),
    ],
    ids=str,
)
def test_values_at_the_edge_can_be_used(name: str, arguments: dict[str, Any]) -> None:
    check_agent(name, arguments)
    build_agent(name, started_env(), seed=0, arguments=arguments)


@pytest.mark.parametrize("name", AGENTS)
def test_hyperparameters_are_documented_and_cannot_be_changed(name: str) -> None:
    settings = AGENTS[name].settings_type()
    for entry in fields(settings):
        written = "".join(kind.__doc__ or "" for kind in type(settings).__mro__)
        assert f"        {entry.name}: " in written
        with pytest.raises(FrozenInstanceError):
            setattr(settings, entry.name, None)
