"""Agents that learn against the environment; they never open the student.

`AGENTS` holds the agents of this package. A name in `WEIGHTINGS` is a classical weighting, and
every other name one of Stable-Baselines3, sb3-contrib, or `module:Class`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from agents.base import Agent, Transition
from agents.fixed import Oracle, Uniform
from agents.policy_gradient import PolicyGradient
from agents.sb3 import SB3Agent, algorithm_class
from agents.weighting import WeightingAgent
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import check_arguments
from mtkd_env.weighting import WEIGHTINGS

__all__ = [
    "AGENTS",
    "Agent",
    "Oracle",
    "PolicyGradient",
    "SB3Agent",
    "Transition",
    "Uniform",
    "WeightingAgent",
    "algorithm_class",
    "build_agent",
]

AGENTS: Mapping[str, Callable[..., Agent]] = {
    "oracle": Oracle,
    "pg": PolicyGradient,
    "uniform": Uniform,
}


def build_agent(name: str, env: MTKDVectorEnv, *, seed: int, arguments: Mapping[str, Any]) -> Agent:
    """An agent by name.

    Args:
        name: In `AGENTS` or `WEIGHTINGS`, an algorithm of Stable-Baselines3 or sb3-contrib, or
            `module:Class`.
        env: The environment that it acts in.
        seed: Seed of everything the agent draws.
        arguments: Further keyword arguments of the agent.

    Raises:
        ConfigError: Unknown name or argument.
    """
    if name in AGENTS:
        check_arguments(AGENTS[name], arguments, "agent.arguments")
        return AGENTS[name](env, seed=seed, **arguments)
    if name in WEIGHTINGS:
        check_arguments(WEIGHTINGS[name], arguments, "agent.arguments")
        return WeightingAgent(env, WEIGHTINGS[name](**arguments))
    return SB3Agent(env, name, seed=seed, **arguments)
