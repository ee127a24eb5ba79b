"""Agents that learn against the environment; they never open the student.

- `base.py`: what every agent can do, and the warm-up.
- `policy_gradient.py`: the paper's agent `pg`, Equ. 7 and Algorithms 1-2; the loop of all learners.
- `reinforce.py` with `distributions.py`, `dpg.py`: `reinforce` and `dpg` in the same loop.
- `history.py`: what learners keep between two updates; `learning.py`: optimisers, random numbers.
- `fixed.py`: `uniform` and `oracle`, which learn nothing; `weighting.py`: classical weightings.
- `sb3.py`: any algorithm of Stable-Baselines3 or sb3-contrib, or `module:Class`; with
  `sb3_state.py` (checkpoints), `tensor_rollouts.py`, `ars.py`, `callbacks.py`, `isolation.py`.

A name is looked up in `AGENTS`, then in `WEIGHTINGS`; every other one is for `sb3.py`.
"""

from collections.abc import Mapping
from typing import Any

from agents.base import PATH, Agent
from agents.dpg import DPG
from agents.fixed import Oracle, Uniform
from agents.policy_gradient import PolicyGradient, Transition
from agents.reinforce import Reinforce
from agents.sb3 import SB3Agent, algorithm_class, check_sb3_arguments
from agents.weighting import WeightingAgent
from mtkd import require
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_arguments
from mtkd_env.options import build, typed
from mtkd_env.weighting import WEIGHTINGS

require(("agents",))

__all__ = [
    "AGENTS",
    "DPG",
    "Agent",
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


def check_agent(name: str, arguments: Mapping[str, Any]) -> None:
    """Checks an agent's name and arguments, so that mistakes show before teachers are trained.

    Args:
        name: In `AGENTS` or `WEIGHTINGS`, an algorithm of Stable-Baselines3 or sb3-contrib, or
            `module:Class`.
        arguments: Keyword arguments of the agent, without environment and seed.

    Raises:
        ConfigError: Unknown name or argument, or a value that cannot be used.
    """
    for argument in SET_BY_THE_RUN:
        if argument in arguments:
            raise ConfigError(f"{PATH}.{argument}: cannot be given; the run sets it")
    if name in AGENTS:
        build(AGENTS[name].settings_type, arguments, PATH)
    elif name in WEIGHTINGS:
        check_arguments(WEIGHTINGS[name], arguments, PATH)
        typed(WEIGHTINGS[name], arguments, PATH)
    else:
        check_sb3_arguments(name, arguments, others={**AGENTS, **WEIGHTINGS})


def build_agent(name: str, env: MTKDVectorEnv, *, seed: int, arguments: Mapping[str, Any]) -> Agent:
    """An agent by name.

    Args:
        name: See `check_agent`.
        env: The environment that it acts in.
        seed: Seed of everything the agent draws.
        arguments: Further keyword arguments of the agent.

    Raises:
        ConfigError: Unknown name or argument.
    """
    check_agent(name, arguments)
    try:
        if name in AGENTS:
            return AGENTS[name](env, seed=seed, **arguments)
        if name in WEIGHTINGS:
            arguments = typed(WEIGHTINGS[name], arguments, PATH)
            return WeightingAgent(env, WEIGHTINGS[name](env.distiller, seed=seed, **arguments))
        return SB3Agent(env, name, seed=seed, **arguments)
    except ConfigError:
        raise
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"agent: {name} cannot be built: {error}") from error
