"""PRETRAINED: an agent that has learned elsewhere whom to ask, and learns no more."""

from pathlib import Path

import torch

from mtkd_env.action import generated_weights, with_prior
from mtkd_env.agent_file import PRETRAINED, load_agent
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.observation import RELATIVE, RELATIVE_VERSION, RelativeObserver
from mtkd_env.seeding import seeded
from mtkd_env.shared_policy import SharedPolicy
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting
from mtkd_env.weighting.consensus import CONSENSUS, Consensus


class Pretrained(Weighting):
    """Weights by a frozen `SharedPolicy`, for any teachers and classes; needs no label.

    What `--algo pretrained` acts with as an agent, and what the fusion `prior` can begin from. The
    file's JSON says what it was trained on.

    Args:
        load: Folder of a run, or an agent's file, with a shared policy; by default the agent that
            is shipped.

    Raises:
        ConfigError: No such file, or an agent of another kind or version.
    """

    def __init__(
        self, distiller: Distiller, *, seed: int = 0, load: str | Path = PRETRAINED
    ) -> None:
        super().__init__(distiller, seed=seed)
        file = load_agent(load)
        spaces = file.spaces
        try:
            sizes = int(spaces["hidden"]), int(spaces["layers"])
            with seeded(0):  # Leaves the numbers of others alone.
                network = SharedPolicy(*sizes)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{file.path}: expected an agent with policy 'shared'") from None
        seen = {"observation": RELATIVE, "version": RELATIVE_VERSION, "policy": "shared"}
        # What a policy may have begun with, which needs no label either.
        begun = {"prior": CONSENSUS} if "prior" in spaces else {}
        file.check({**spaces, **seen, **begun, "outputs": "logits"})
        file.load_into(network, "policy")
        self._prior = Consensus(distiller) if begun else None
        self._policy = network.to(distiller.device).eval().requires_grad_(False)
        self._observer = RelativeObserver(distiller.teachers.names, distiller.reference)

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """The policy's weights."""
        generated = generated_weights(self._policy(self._observer(state)))
        return with_prior(self._prior(state), generated) if self._prior else generated
