"""Many tasks in one environment: drawn, padded to one width, one after the other."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
import yaml

import mtkd_env.testing
from mtkd_env import TaskList, TasksVectorEnv, make_tasks_env
from mtkd_env.errors import ConfigError
from mtkd_env.observation import RelativeObserver
from mtkd_env.task_list import drawn
from mtkd_env.wrappers.sb3 import SB3VecEnv
from refusals import REFUSALS

NUM_ENVS, MOST = 8, 3
SHIPPED = sorted((Path(__file__).parents[2] / "experiments" / "configs" / "tasks").glob("*.yaml"))
WIDTH = RelativeObserver.features_per_teacher


def untrained(count: int) -> list[dict[str, Any]]:
    """Teachers that need no training."""
    return [
        {"network": "cnn3", "name": f"t{n}", "seed": n, "width": 0.25, "kind": "random"}
        for n in range(count)
    ]


# A student of two steps each.
CONTENT: dict[str, Any] = {
    "base": {
        "data": {"train_size": 2 * NUM_ENVS, "batch_size": NUM_ENVS},
        "student": {"network": "cnn3", "width": 0.25},
        "optimizer": {"epochs": 1},
        "distillation": {"beta": 0, "feature": "none"},
        "computing": {"device": "cpu"},
    },
    "draw": {"distillation.temperature": {"uniform": [1, 4]}},
    "tasks": {
        "two": {"teachers": {"teachers": untrained(2)}},
        "some": {
            "teachers": {"teachers": untrained(4)},
            "draw": {"teachers.members": {"integers": [1, MOST]}, "student.width": [0.25, 0.5]},
        },
    },
    "held_out": {"one": {"teachers": {"teachers": untrained(1)}}},
}


def content(changes: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The tasks with other values at some dotted paths."""
    changed = deepcopy(CONTENT)
    for path, value in changes.items():
        inside = changed
        *keys, last = path.split("/")
        for key in keys:
            inside = inside.setdefault(key, {})
        inside[last] = value
    return changed


def make_env(episode: str = "batch", **keywords: Any) -> TasksVectorEnv:
    return make_tasks_env(tasks=content({"base/env": {"episode": episode}}), **keywords)


def actions(env: TasksVectorEnv, seed: int = 0) -> np.ndarray:
    return mtkd_env.testing.random_action(env, seed)


# The list.


def test_a_list_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    read, given = TaskList(path), TaskList(CONTENT)
    assert read.digest == given.digest
    assert (read.num_envs, read.most_teachers) == (NUM_ENVS, MOST)
    assert [family.name for family in read.training] == ["two", "some"]
    assert [family.name for family in read.held_out] == ["one"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_lists_can_be_read(path: Path) -> None:
    tasks = TaskList(path)
    assert tasks.held_out
    assert "CIFAR" not in path.read_text()


def test_draws_lie_where_they_are_said_to() -> None:
    some = TaskList(CONTENT).training[1]
    random = np.random.default_rng(0)
    tasks = [some.draw(random).arguments for _ in range(12)]
    assert {len(task["teachers"]["members"]) for task in tasks} == {1, 2, 3}
    assert {task["student"]["width"] for task in tasks} == {0.25, 0.5}
    temperatures = [task["distillation"]["temperature"] for task in tasks]
    assert 1 <= min(temperatures) < 2 < 3 < max(temperatures) <= 4


@pytest.mark.parametrize(
    ("form", "low", "high"),
    [
        ({"integers": [2, 4]}, 2, 4),
        ({"log_uniform": [0.01, 1]}, 0.01, 1),
        ({"uniform": [-1, 1]}, -1, 1),
    ],
)
def test_ranges_hold_their_ends(form: dict[str, Any], low: float, high: float) -> None:
    random = np.random.default_rng(0)
    values = [drawn(form, random) for _ in range(200)]
    assert low <= min(values) <= max(values) <= high
    if "log_uniform" in form:
        assert 0.05 < np.median(values) < 0.2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bas": {}}, "unknown key 'bas'; did you mean 'base'"),
        ({"tasks": {}}, "tasks: expected at least one"),
        ({"tasks/two/student": {"widths": 1}}, "task 'two': student.widths: .* mean 'width'"),
        ({"tasks/two/env": {}}, "tasks.two.env: is the same for all tasks"),
        ({"tasks/two/data": {"batch_size": 4}}, "tasks.two.data.batch_size: is the same"),
        ({"base/env": {"observation": "label_free"}}, "observation: expected 'relative'"),
        ({"draw": {"student.width": {"uniform": [2, 1]}}}, "draw.student.width: expected a list"),
        ({"draw": {"env.reward": ["paper"]}}, "unknown draw of 'env.reward'"),
        ({"draw": {"student.width": []}}, "draw.student.width: expected a list"),
        ({"draw": {"teachers.members": {"integers": [0, 1]}}}, "expected at least one teacher"),
        ({"draw": {"teachers.members": [["a"], []]}}, "expected at least one teacher"),
        ({"draw": {"student.width": {"unifrm": [1, 2]}}}, "did you mean 'uniform'"),
    ],
)
def test_lists_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TaskList(content(changes))


def test_what_is_wrong_in_a_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: no such file"):
        TaskList(tmp_path / "none.yaml")
    (tmp_path / "tasks.yaml").write_text("tasks: 3")
    with pytest.raises(ConfigError, match=r"tasks.yaml: tasks: expected keys and values"):
        TaskList(tmp_path / "tasks.yaml")


def test_a_task_whose_pool_cannot_be_made_is_named() -> None:
    teachers = {"teachers": [{"network": "cnn3", "images": 10**6}]}
    env = make_tasks_env(tasks=content({"tasks": {"too many": {"teachers": teachers}}}))
    with pytest.raises(ConfigError, match=r"task 'too many': teachers.cnn3.images: expected"):
        env.reset(seed=0)


# The environment.


@pytest.mark.slow
@pytest.mark.parametrize("episode", ["batch", "training"])
def test_it_passes_the_checks(episode: str) -> None:
    mtkd_env.testing.check_env(lambda: make_env(episode))
    for check in REFUSALS:
        check(lambda: make_env(episode))


def test_gymnasium_makes_it() -> None:
    env = gymnasium.make_vec("MTKD/Tasks-v0", tasks=CONTENT, num_envs=4, device="cpu")
    assert isinstance(env, TasksVectorEnv)
    assert env.observation_space.shape == (4, MOST * WIDTH)
    assert env.action_space.shape == (4, 2 * MOST)


@pytest.mark.parametrize("episode", ["batch", "training"])
def test_the_next_task_follows_within_the_step_in_every_scope(episode: str) -> None:
    env = make_env(episode)
    env.reset(seed=0)
    names = []
    for step in range(4):
        before = env.steps
        *_, info = env.step(actions(env, step))
        names.append(info["task"][0])
        assert len(set(info["task"])) == 1
        assert env.steps == (before + 1) % 2
    assert names[::2] == names[1::2]
    assert {*names} == {"two", "some"}


def test_teachers_that_are_not_there_see_zeros_and_weigh_exactly_zero() -> None:
    env = make_env()
    observation, _ = env.reset(seed=0)
    for step in range(4):
        there = len(env.env.teacher_names)
        rows = observation.reshape(NUM_ENVS, MOST, WIDTH)
        assert (rows[:, :there, -1] == 1).all()
        assert (rows[:, there:] == 0).all()
        observation, *_, info = env.step(actions(env, step))
        for name in ("logit_weights", "feature_weights"):
            assert info[name].shape == (NUM_ENVS, MOST)
            assert (info[name][:, there:] == 0).all()
            assert np.allclose(info[name].sum(1), 1)


def test_a_seed_reproduces_tasks_and_steps() -> None:
    mtkd_env.testing.a_seed_reproduces_everything_that_follows(make_env)
    mtkd_env.testing.returned_values_lie_in_the_spaces(make_env)


def test_a_step_is_that_of_the_tasks_own_environment() -> None:
    env = make_env()
    env.reset(seed=3)
    inside = env.task.make()
    inside.reset(seed=env._student_seed)
    there = len(inside.teacher_names)
    action = actions(env).reshape(NUM_ENVS, 2, MOST)
    *_, info = env.step(action.reshape(NUM_ENVS, -1))
    *_, expected = inside.step(action[..., :there].reshape(NUM_ENVS, -1))
    for name in ("teacher_rewards", "logit_weights", "kd"):
        assert np.array_equal(info[name][:, :there], expected[name])


def test_reinit_draws_the_next_task() -> None:
    env = make_env()
    env.reset(seed=0)
    first = env.task.name
    env.reset(options={"reinit": True})
    assert env.task.name != first


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    env, other = make_env(), make_env()
    env.reset(seed=5)
    mtkd_env.testing.rollout(env, 3)
    state = deepcopy(env.state_dict())
    other.reset(seed=0)
    other.load_state_dict(state)
    first, second = (mtkd_env.testing.rollout(each, 3, seed=9) for each in (env, other))
    assert mtkd_env.testing.equal(first, second)


def test_held_out_tasks_are_others() -> None:
    env = make_env(held_out=True)
    env.reset(seed=0)
    assert env.task.name == "one"
    assert env.observation_space.shape == (NUM_ENVS, MOST * WIDTH)


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [("PPO", {"n_steps": 4, "batch_size": 16}), ("SAC", {"learning_starts": 16, "batch_size": 16})],
)
def test_algorithms_learn_in_it(algorithm: str, arguments: dict[str, Any]) -> None:
    env = make_env()
    tasks: list[str] = []
    env.subscribe(lambda _: tasks.append(env.task.name))
    model = getattr(stable_baselines3, algorithm)("MlpPolicy", SB3VecEnv(env), seed=0, **arguments)
    model.learn(8 * NUM_ENVS)
    assert len(tasks) == 8
    assert {*tasks} == {"two", "some"}
    for value in model.policy.state_dict().values():
        assert torch.isfinite(value).all()
