"""Agents that learn against the environment; they never open the student.

- `base.py`: what every agent can do, and the warm-up.
- `policy_gradient.py`: the paper's agent `pg`, Equ. 7 and Algorithms 1-2; the loop of all learners.
- `reinforce.py` with `distributions.py`, `dpg.py`: `reinforce` and `dpg` in the same loop.
- `history.py`: what learners keep between two updates; `learning.py`: optimisers.
- `fixed.py`: `uniform` and `oracle`, which learn nothing; `weighting.py`: classical weightings.
- `sb3.py`: any algorithm of Stable-Baselines3 or sb3-contrib; with
  `policies.py` (shared by the teachers), `sb3_state.py` (checkpoints), `ars.py`, `callbacks.py`,
  `isolation.py`.

A name is looked up in `AGENTS`, then in `WEIGHTINGS`; every other one is for `sb3.py`. Classes of
these three kinds may also be given as objects or as `module:Class`.
"""

from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from agents.base import PATH, Agent, Frozen
from agents.dpg import DPG
from agents.fixed import Oracle, Uniform
from agents.policy_gradient import LearningAgent, PolicyGradient, Transition
from agents.reinforce import Reinforce
from agents.sb3 import SB3Agent, algorithm_class, check_sb3_arguments, is_algorithm
from agents.weighting import WeightingAgent
from mtkd import require
from mtkd_env.agent_file import AgentFile, load_agent
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_arguments, errors_of
from mtkd_env.imports import Kind, Named, is_class, name_of
from mtkd_env.options import build, typed
from mtkd_env.weighting import WEIGHTING, WEIGHTINGS

require(("agents",))

__all__ = [
    "AGENTS",
    "DPG",
    "Agent",
    "Frozen",
    "Oracle",
    "PolicyGradient",
    "Reinforce",
    "SB3Agent",
    "Transition",
    "Uniform",
    "WeightingAgent",
    "algorithm_class",
    "build_agent",
    "check_agent",
    "find_agent",
]

AGENTS: Mapping[str, type[Agent]] = {
    "dpg": DPG,
    "oracle": Oracle,
    "pg": PolicyGradient,
    "reinforce": Reinforce,
    "uniform": Uniform,
}

# Arguments of every agent that are not the user's.
SET_BY_THE_RUN = ("self", "env", "distiller", "algorithm", "seed")


AGENT: Kind[Any] = Kind(
    {**WEIGHTINGS, **AGENTS},
    "agent",
    lambda found: is_class(found, Agent) or is_algorithm(found) or WEIGHTING.fits(found),
    "a class of Agent, of Weighting or of a Stable-Baselines3 algorithm",
)


def find_agent(given: Named, others: Iterable[str] = ()) -> Any:
    """The class of an agent, a weighting or an algorithm.

    Args:
        given: What `AGENT` finds, or an algorithm of Stable-Baselines3 or sb3-contrib.
        others: Further names that an error may suggest.

    Raises:
        ConfigError: There is none.
    """
    if isinstance(given, str) and ":" not in given and given not in AGENT.table:
        return algorithm_class(given, [*AGENT.table, *others])
    return AGENT.find(given)


def check_agent(
    given: Named,
    arguments: Mapping[str, Any],
    *,
    load: str | Path | None = None,
    learn: bool = True,
    others: Iterable[str] = (),
) -> AgentFile | None:
    """Checks an agent and its arguments, so that mistakes show before teachers are trained.

    Args:
        given: See `find_agent`.
        arguments: Keyword arguments of the agent, without environment and seed.
        load: See `build_agent`.
        learn: See `build_agent`.
        others: Further names that an error may suggest.

    Returns:
        What there is to load.

    Raises:
        ConfigError: Unknown name or argument, a value that cannot be used, or nothing to load.
    """
    if load is None and not learn:
        raise ConfigError("agent.learn: false needs agent.load, which says what to act with")
    with errors_of("agent.load"):
        file = None if load is None else load_agent(load)
    for argument in SET_BY_THE_RUN:
        if argument in arguments:
            raise ConfigError(f"{PATH}.{argument}: cannot be given; the run sets it")
    found = find_agent(given, others)
    if is_algorithm(found):
        check_sb3_arguments(found, arguments)
    elif is_class(found, Agent):
        build(found.settings_type, arguments, PATH)
    else:
        check_arguments(found, arguments, PATH)
        typed(found, arguments, PATH)
    return file


def build_agent(
    given: Named,
    env: MTKDVectorEnv,
    *,
    seed: int,
    arguments: Mapping[str, Any],
    load: str | Path | None = None,
    learn: bool = True,
) -> Agent:
    """An agent.

    Args:
        given: See `find_agent`.
        env: The environment that it acts in.
        seed: Seed of everything the agent draws.
        arguments: Further keyword arguments of the agent.
        load: What another agent has learned, to begin from: the folder of its run, its file, or
            `pretrained` for the agent that is shipped. Its network is the other's unless arguments
            say otherwise.
        learn: Whether it goes on learning; if not, it only acts with what it has loaded.

    Raises:
        ConfigError: Unknown name or argument, or something that it cannot load.
    """
    file = check_agent(given, arguments, load=load, learn=learn)
    if file is None:
        return _made(given, env, seed, arguments)
    agent = _made(given, env, seed, {**_network_of(file.spaces, given), **arguments})
    with errors_of("agent.load"):
        agent.load(file)
    return agent if learn else Frozen(agent)


def _network_of(spaces: Mapping[str, Any], given: Named) -> dict[str, Any]:
    """Arguments by which an agent gets the network of another one, where that is of its kind."""
    found = find_agent(given)
    if is_algorithm(found):
        names = {"policy": "network", "policy_kwargs": "policy_kwargs"}
        return {key: spaces[name] for key, name in names.items() if name in spaces}
    if not is_class(found, LearningAgent):
        return {}
    return {key: spaces[key] for key in ("policy", "hidden", "layers") if key in spaces}


def _made(given: Named, env: MTKDVectorEnv, seed: int, arguments: Mapping[str, Any]) -> Agent:
    found = find_agent(given)
    try:
        if is_algorithm(found):
            return SB3Agent(env, given, seed=seed, **arguments)
        if is_class(found, Agent):
            return found(env, seed=seed, **arguments)
        arguments = typed(found, arguments, PATH)
        if "seed" in signature(found).parameters:
            arguments["seed"] = seed
        return WeightingAgent(env, found(env.distiller, **arguments))
    except ConfigError:
        raise
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"agent: {name_of(given)} cannot be built: {error}") from error
