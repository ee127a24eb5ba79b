"""What an agent leaves behind, and where it serves again."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from agents import Agent, Frozen, build_agent, check_agent
from known_optimum import started_env
from mtkd_env.action import PRIOR
from mtkd_env.agent_file import PRETRAINED, SHIPPED, load_agent
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.observation import RELATIVE_VERSION
from mtkd_env.registration import prior_of
from mtkd_env.weighting import WEIGHTINGS
from mtkd_env.weighting.pretrained import Pretrained
from tiny import SB3_ARGUMENTS, make_tiny_distiller

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pg": ("pg", {"hidden": 8}),
    "pg shared": ("pg", {"policy": "shared", "hidden": 8}),
    "reinforce dirichlet": ("reinforce", {"distribution": "dirichlet"}),
    "reinforce gaussian": ("reinforce", {"distribution": "gaussian"}),
    "dpg": ("dpg", {}),
    "ppo": ("ppo", SB3_ARGUMENTS["ppo"]),
    "sac": ("sac", SB3_ARGUMENTS["sac"]),
    "sac shared": ("sac", {**SB3_ARGUMENTS["sac"], "policy": "shared"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def env_of(kind: str = "pg shared", **kwargs: Any) -> MTKDVectorEnv:
    observation = "relative" if "shared" in kind else "all"
    return started_env(**{"observation": observation, "fusion": "generator", **kwargs})


def saved(folder: Path, kind: str = "pg shared", **kwargs: Any) -> Agent:
    """An agent that has learned and was saved."""
    name, arguments = KINDS[kind]
    agent = build_agent(name, env_of(kind, **kwargs), seed=0, arguments=arguments)
    agent.learn(2, lambda: None)
    agent.save(folder, {"trained_on": "noise"})
    return agent


def loaded(folder: Path, kind: str, env: MTKDVectorEnv, *, learn: bool = True) -> Agent:
    name, arguments = KINDS[kind]
    return build_agent(name, env, seed=5, arguments=arguments, load=folder, learn=learn)


@every_kind
def test_a_loaded_agent_acts_as_the_saved_one(kind: str, tmp_path: Path) -> None:
    agent, other = saved(tmp_path, kind), env_of(kind, seed=3)
    found = loaded(tmp_path, kind, other)
    seen = agent.env.observation
    assert found.act(seen).equal(agent.act(seen))
    if agent.env.normalizer:
        raw = agent.env.keepable_observation
        assert other.normalize(raw).equal(agent.env.normalize(raw))
    before = found.updates
    found.learn(2, lambda: None)
    assert found.updates > before
    assert not found.act(seen).equal(agent.act(seen))


@pytest.mark.parametrize("activation", ["Tanh", nn.Tanh])
def test_a_loaded_algorithm_has_the_others_network(activation: Any, tmp_path: Path) -> None:
    network = {"net_arch": [8], "activation_fn": activation}
    arguments = {**SB3_ARGUMENTS["sac"], "policy": "shared", "policy_kwargs": network}
    agent = build_agent("sac", env_of(), seed=0, arguments=arguments)
    agent.save(tmp_path)
    found = build_agent("sac", env_of(), seed=1, arguments={}, load=tmp_path, learn=False)
    seen = agent.env.observation
    assert found.act(seen).equal(agent.act(seen))


@every_kind
def test_a_frozen_agent_trains_the_student_and_learns_nothing(kind: str, tmp_path: Path) -> None:
    agent = saved(tmp_path, kind)
    found = loaded(tmp_path, kind, env_of(kind, seed=3), learn=False)
    assert isinstance(found, Frozen)
    before = deepcopy(found.env.distiller.student.state_dict())
    found.learn(1, lambda: None)
    assert found.updates == 0
    after = found.env.distiller.student.state_dict()
    assert not all(tensor.equal(after[name]) for name, tensor in before.items())
    seen = agent.env.observation
    assert found.act(seen).equal(agent.act(seen))
    found.save(tmp_path / "again")
    tensors = [load_agent(folder).part("policy") for folder in (tmp_path, tmp_path / "again")]
    assert all(tensor.equal(tensors[1][name]) for name, tensor in tensors[0].items())


def test_the_network_is_that_of_the_file_unless_arguments_say_otherwise(tmp_path: Path) -> None:
    saved(tmp_path)
    env = env_of(count=2)
    agent = build_agent("reinforce", env, seed=0, arguments={}, load=tmp_path)
    assert agent.act(env.observation).shape == (env.num_envs, 4)
    with pytest.raises(ConfigError, match=r"the agent was made for hidden 8; expected hidden 9$"):
        build_agent("pg", env, seed=0, arguments={"hidden": 9}, load=tmp_path)


def test_learnt_fusion_coefficients_are_kept_beside_the_policy(tmp_path: Path) -> None:
    agent = saved(tmp_path, "pg", fusion="learnable")
    other = env_of("pg", fusion="learnable")
    loaded(tmp_path, "pg", other)
    assert other.fusion.logits.equal(agent.env.fusion.logits)


MISFITS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "other teachers": (
        *("pg", "pg", {"count": 2}),
        "the agent was made for width 38, teachers 3; expected width 26, teachers 2",
    ),
    "standardised or not": (
        *("pg", "pg", {"normalize_observation": False}),
        "the agent was made for normalized True; expected normalized False",
    ),
    "another algorithm": (
        *("ppo", "sac", {}),
        "the agent was made for algorithm PPO; expected algorithm SAC",
    ),
    "outputs that mean something else": (
        *("reinforce dirichlet", "reinforce gaussian", {}),
        "the agent was made for outputs concentrations; expected outputs logits",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_spaces_that_differ_are_shown_on_both_sides(case: str, tmp_path: Path) -> None:
    kind, other, changes, message = MISFITS[case]
    saved(tmp_path, kind)
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, other, env_of(other, **changes))
    assert str(error.value) == f"agent.load: {tmp_path / 'agent.safetensors'}: {message}"


def test_a_shared_policy_is_not_loaded_where_it_would_see_something_else(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match=r"policy: 'shared' needs the observation 'relative'"):
        build_agent("pg", env_of("pg"), seed=0, arguments={}, load=tmp_path, learn=False)


@pytest.mark.parametrize("name", ["uniform", "aver"])
def test_who_learns_nothing_loads_nothing(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match=r"learns nothing that could be loaded"):
        build_agent(name, env_of(), seed=0, arguments={}, load=tmp_path)


def test_nobody_acts_with_a_policy_that_has_not_learned() -> None:
    with pytest.raises(ConfigError, match=r"^agent\.learn: false needs agent\.load"):
        check_agent("pg", {}, learn=False)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "agent.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_tensors(folder: Path) -> None:
    path = folder / "agent.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)


DAMAGES: Mapping[str, tuple[Any, str]] = {
    "no tensors": (lambda f: (f / "agent.safetensors").unlink(), "no agent is there; expected a"),
    "no JSON": (lambda f: (f / "agent.json").unlink(), "cannot be read: No such file"),
    "not JSON": (lambda f: (f / "agent.json").write_text("{"), "not valid JSON ("),
    "another JSON": (
        lambda f: (f / "agent.json").write_text("[]"),
        "expected keys and values, and among them sha256",
    ),
    "another format": (lambda f: rewrite(f, format=2), "spaces in format 1, found format 2"),
    "other tensors": (replace_tensors, "holds other tensors than agent.json was written for"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_agent("pg", {}, load=tmp_path)
    text = str(error.value)
    assert text.startswith(f"agent.load: {tmp_path}")
    assert message in text
    assert "\n" not in text


# The agent that is shipped, and others, as a weighting.


def test_the_weighting_does_what_the_frozen_agent_does(tmp_path: Path) -> None:
    saved(tmp_path)
    env = env_of(count=2)
    agent = loaded(tmp_path, "pg shared", env, learn=False)
    weights = Pretrained(env.distiller, load=tmp_path)(env.state)
    expected = env.to_weights(agent.act(env.observation))
    assert weights.logit.equal(expected.logit)
    assert weights.feature.equal(expected.feature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0}, "the agent was made for version 0; expected version"),
        ({"outputs": "concentrations"}, "made for outputs concentrations; expected outputs logits"),
        ({"policy": "teacher"}, "made for policy teacher; expected policy shared"),
        ({"hidden": 4}, "policy: trunk.each.0.weight: expected [4, 22], found [8, 22]"),
        ({"hidden": None}, "expected an agent with policy 'shared'"),
    ],
)
def test_the_weighting_takes_no_other_agent(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    spaces = json.loads((tmp_path / "agent.json").read_text())["spaces"]
    rewrite(tmp_path, spaces=spaces | changes)
    with pytest.raises(ConfigError) as error:
        Pretrained(make_tiny_distiller(), load=tmp_path)
    assert message in str(error.value)


def test_the_shipped_agent_fits_this_version_and_says_where_it_comes_from() -> None:
    file = load_agent(PRETRAINED)
    assert file.spaces["version"] == RELATIVE_VERSION
    assert file.notes["command"].startswith("mtkd train-agent --tasks specialists.yaml --algo pg")
    assert file.notes["data"] == ["fashion_mnist"]
    assert min(file.notes["gain over equal weights on held-out tasks"].values()) > 0
    assert SHIPPED.stat().st_size < 500_000


def test_an_agent_begins_from_the_shipped_one_as_a_prior() -> None:
    env = started_env(fusion=PRIOR, prior="pretrained")
    agent = build_agent("pg", env, seed=0, arguments={"prior_weight": 0.5})
    prior = prior_of(env.distiller, "pretrained")
    assert prior is not None
    weights = env.to_weights(agent.act(env.observation))
    torch.testing.assert_close(
        weights.logit, WEIGHTINGS["pretrained"](env.distiller)(env.state).logit
    )
    agent.learn(1, lambda: None)
