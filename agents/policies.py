"""Policies of Stable-Baselines3 by one network that all teachers share, so that M is free.

Their actors are equivariant: reordering the teachers reorders the actions. Their critics do not
depend on the order. They see the observation `relative`; see `mtkd_env.shared_policy`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.shared_policy import (
    FEATURES,
    SharedCritic,
    SharedTrunk,
    mean_of_present,
    split_teachers,
)

Activation = Callable[[], nn.Module]


class TeacherLatents(nn.Module):
    """What is known of each teacher (B, M, H), of an observation `relative`; 0 for absent ones.

    Args:
        widths: See `SharedTrunk`.
        activation: See `SharedTrunk`.
    """

    def __init__(self, widths: Sequence[int], activation: Activation) -> None:
        super().__init__()
        self.trunk = SharedTrunk(FEATURES - 1, widths, activation)

    def forward(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B M H"]:
        """The latents."""
        rows, there = split_teachers(observation)
        return self.trunk(rows, there) * there


class PooledLatents(TeacherLatents):
    """What is known of the sample (B, H): the mean of what is known of each teacher."""

    def forward(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B H"]:
        """The mean over the teachers that are there."""
        _, there = split_teachers(observation)
        return mean_of_present(super().forward(observation), there)


class TeacherHead(nn.Linear):
    """One number (B, 2·M) for each teacher and head; a constant for absent ones."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)

    def forward(self, latents: Float[Tensor, "B M H"]) -> Float[Tensor, "B A"]:
        """Those of the logit head first."""
        return super().forward(latents).transpose(1, 2).flatten(1)


class JoinedCritic(SharedCritic):
    """A `SharedCritic` of observation and actions in one row, as the library gives them."""

    def forward(self, joined: Float[Tensor, "B J"]) -> Float[Tensor, "B 1"]:  # type: ignore[override] # one row
        """The value of each sample's actions."""
        teachers = joined.shape[1] // (FEATURES + 2)
        seen, acted = joined.tensor_split([teachers * FEATURES], dim=1)
        return super().forward(seen, acted)


class SharedActorCriticPolicy(ActorCriticPolicy):
    """For `ppo`, `a2c` and `trpo`; all actions have one deviation."""

    def _build_mlp_extractor(self) -> None:
        arch = self.net_arch
        both = (arch.get("pi"), arch.get("vf")) if isinstance(arch, dict) else (arch, arch)
        actor, critic = (_checked_widths(widths) for widths in both)
        # The library's, with networks that the teachers share in the place of its own.
        extractor = MlpExtractor(self.features_dim, [], self.activation_fn)
        extractor.add_module("policy_net", TeacherLatents(actor, self.activation_fn))
        extractor.add_module("value_net", PooledLatents(critic, self.activation_fn))
        extractor.latent_dim_pi, extractor.latent_dim_vf = actor[-1], critic[-1]
        self.mlp_extractor = extractor.to(self.device)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        head = TeacherHead(self.mlp_extractor.latent_dim_pi)
        if self.ortho_init:
            head.apply(partial(self.init_weights, gain=0.01))
        self.action_net = head.to(self.device)
        self.log_std = nn.Parameter(torch.full((1,), self.log_std_init, device=self.device))
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg] # all optimisers have one
            **self.optimizer_kwargs,
        )


class SharedSACPolicy(SACPolicy):
    """For `sac`."""

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> SACActor:
        """The library's actor with networks that the teachers share."""
        actor = super().make_actor(features_extractor)
        widths = _checked_widths(actor.net_arch)
        actor.latent_pi = TeacherLatents(  # type: ignore[assignment] # in the place of a sequence
            widths, actor.activation_fn
        )
        actor.mu = TeacherHead(widths[-1])
        actor.log_std = TeacherHead(widths[-1])  # type: ignore[assignment] # a layer here, too
        return actor.to(self.device)

    def make_critic(
        self, features_extractor: BaseFeaturesExtractor | None = None
    ) -> ContinuousCritic:
        """The library's critics with networks that the teachers share."""
        return _shared_critic(self, super().make_critic(features_extractor), self.critic_kwargs)


class SharedTD3Policy(TD3Policy):
    """For `td3` and `ddpg`."""

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> TD3Actor:
        """The library's actor with networks that the teachers share."""
        actor = super().make_actor(features_extractor)
        widths = _checked_widths(actor.net_arch)
        latents = TeacherLatents(widths, actor.activation_fn)
        actor.mu = nn.Sequential(latents, TeacherHead(widths[-1]), nn.Tanh())
        return actor.to(self.device)

    def make_critic(
        self, features_extractor: BaseFeaturesExtractor | None = None
    ) -> ContinuousCritic:
        """The library's critics with networks that the teachers share."""
        return _shared_critic(self, super().make_critic(features_extractor), self.critic_kwargs)


# The policies with shared networks, by what the library calls MlpPolicy.
SHARED_POLICIES: Mapping[type[BasePolicy], type[BasePolicy]] = {
    ActorCriticPolicy: SharedActorCriticPolicy,
    SACPolicy: SharedSACPolicy,
    TD3Policy: SharedTD3Policy,
}


def shared_policy_of(algorithm: type[BaseAlgorithm]) -> type[BasePolicy]:
    """The policy of an algorithm whose networks the teachers share.

    Raises:
        ConfigError: There is none.
    """
    usual = algorithm.policy_aliases.get("MlpPolicy")
    found = SHARED_POLICIES.get(usual) if usual is not None else None
    if found is None:
        raise ConfigError(
            "policy: 'shared' takes the place of the policies of ppo, a2c, trpo, sac, td3 and "
            f"ddpg; {algorithm.__name__} has another one"
        )
    return found


def _checked_widths(widths: Any) -> list[int]:
    if not widths:
        raise ConfigError("policy_kwargs.net_arch: 'shared' needs at least one layer")
    return list(widths)


def _shared_critic(
    policy: BasePolicy, critic: ContinuousCritic, arguments: Mapping[str, Any]
) -> ContinuousCritic:
    widths = _checked_widths(arguments["net_arch"])
    for number in range(critic.n_critics):
        network = JoinedCritic(widths, arguments["activation_fn"])
        setattr(critic, f"qf{number}", network)
        critic.q_networks[number] = network
    return critic.to(policy.device)
