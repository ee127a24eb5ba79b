"""Does a reward pay for the teachers that truly help? At several points of a student's training."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.signal_report import Agreement, SignalReport, TrainingPoint
from experiments.benchmarks.usefulness import (
    TERMS,
    TRUTHS,
    by_term,
    finds_best,
    kendall,
    most_frequent_share,
    usefulness,
)
from experiments.config import CONFIGS, ExperimentConfig, parse_arguments
from mtkd_env import MTKDVectorEnv
from mtkd_env.env import CHOICES
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.reward import REWARDS, RewardFunction, make_reward
from mtkd_env.types import Batch, TeacherWeights

# Who trains the student; which samples are easy, and so what helps them, depends on it.
TRAINER = "aver"

# The pool that is there unless another one is named, as against those that are broken on purpose.
CLEAN = "clean"
NAMED = "configured"

# A reward and whether it is of the student before or after its step.
Paid = tuple[str, str]


def pools(request: Request) -> dict[str, list[str]]:
    """Flags that select every pool: the configured one; unless the user named it, others too.

    Those are the files `configs/pool/DATASET_*.yaml`.
    """
    config = request.configs([TRAINER])[TRAINER]
    if config.teachers != parse_arguments([])[0].teachers:
        return {NAMED: []}
    prefix = f"{config.data.dataset}_"
    shipped = sorted(CONFIGS.glob(f"pool/{prefix}*.yaml"))
    others = {path.stem.removeprefix(prefix): ["--teachers", str(path)] for path in shipped}
    return {CLEAN: [], **others}


def measure(request: Request) -> Outcome:
    """Compares every reward with the true first-order usefulness of the teachers.

    Raises:
        ConfigError: An unknown reward, a point after the end of the training, a single teacher.
    """
    rewards = list(dict.fromkeys(request.methods or REWARDS))
    for reward in rewards:
        check_name(REWARDS, reward, "reward")
    configs = {
        name: request.configs([TRAINER], *flags)[TRAINER] for name, flags in pools(request).items()
    }
    for name, config in configs.items():
        _check(name, config, request.epochs)
    points: list[TrainingPoint] = []
    agreements: list[Agreement] = []
    for name, config in configs.items():
        probes = Probes(request, config, name, rewards)
        for epoch in request.count(request.epochs, f"{name}: points of the training"):
            point, found = probes.at(epoch)
            points.append(point)
            agreements.extend(found)
    return SignalReport(points, agreements, configs, probes.held_out_split).outcome()


def _check(name: str, config: ExperimentConfig, epochs: Sequence[int]) -> None:
    if len(config.teachers.asked) < 2:
        raise ConfigError(f"teachers: the pool '{name}' has one teacher, and nothing to rank")
    if epochs[-1] >= config.optimizer.epochs:
        raise ConfigError(
            f"--epochs: expected less than optimizer.epochs = {config.optimizer.epochs}, "
            f"got {epochs[-1]}"
        )


class Probes:
    """Looks at a student while it learns under equal weights.

    Args:
        request: What was asked for.
        config: The student and its teachers.
        pool: Name of the pool.
        rewards: Names of the rewards.
    """

    def __init__(
        self, request: Request, config: ExperimentConfig, pool: str, rewards: Sequence[str]
    ) -> None:
        self.env = request.build(config).env
        self.env.reset(seed=config.seed)
        self.held_out_split = "val" if "val" in self.env.splits else "test"
        self._held_out: Batch = next(iter(self.env.splits[self.held_out_split]()))
        self._pool = pool
        self._batches = request.rounds
        self._rewards: dict[Paid, RewardFunction] = {
            (name, timing): make_reward(name, self.env.distiller, timing=timing)
            for name, timing in product(rewards, CHOICES["reward_timing"])
        }
        if request.rounds > self.env.steps_per_epoch:
            raise ConfigError(
                f"--rounds: expected at most the {self.env.steps_per_epoch} batches of an epoch, "
                f"got {request.rounds}"
            )

    def at(self, epoch: int) -> tuple[TrainingPoint, list[Agreement]]:
        """Trains until the end of an epoch and looks at the batches that follow."""
        env = self.env
        while env.steps < epoch * env.steps_per_epoch:
            env.distill(TeacherWeights.uniform(env.state.divergence))
        accuracy = env.evaluate(self.held_out_split).accuracy
        looks = [look(env, self._rewards, self._held_out) for _ in range(self._batches)]
        truths = {truth: torch.cat([known[truth] for known, _ in looks]) for truth in TRUTHS}
        credits = {paid: torch.cat([given[paid] for _, given in looks]) for paid in self._rewards}
        point = TrainingPoint(
            pool=self._pool,
            epoch=epoch,
            teachers=len(env.teacher_names),
            samples=len(truths[TRUTHS[0]]),
            accuracy=accuracy,
            constant={
                term: {truth: most_frequent_share(by_term(truths[truth])[term]) for truth in TRUTHS}
                for term in TERMS
            },
        )
        return point, list(self._agreements(epoch, truths, credits))

    def _agreements(
        self, epoch: int, truths: Mapping[str, Tensor], credits: Mapping[Paid, Tensor]
    ) -> Iterator[Agreement]:
        for truth, (reward, timing) in product(TRUTHS, credits):
            credit = credits[reward, timing]
            for term, useful in by_term(truths[truth]).items():
                yield Agreement(
                    pool=self._pool,
                    epoch=epoch,
                    term=term,
                    truth=truth,
                    reward=reward,
                    timing=timing,
                    best=float(finds_best(credit, useful).mean()),
                    tau=float(kendall(credit, useful).mean()),
                    silent=bool((credit == credit[:, :1]).all()),
                )


def look(
    env: MTKDVectorEnv, rewards: Mapping[Paid, RewardFunction], held_out: Batch
) -> tuple[dict[str, Tensor], dict[Paid, Tensor]]:
    """What the teachers are worth on the batch that waits, and what each reward pays them for it.

    The student makes its step on the batch, under equal weights.

    Returns:
        Truth → usefulness (B, 2·M), and reward → advantages (B, M).
    """
    state = env.state
    known = usefulness(env.distiller, state, held_out)
    weights = TeacherWeights.uniform(state.divergence)
    # Before the step, as an environment does with its own reward.
    seen = {key: reward.observe(state) for key, reward in rewards.items()}
    env.distill(weights)
    updated = env.distiller.revisit(state)
    paid = {key: reward(seen[key], weights, updated).advantages for key, reward in rewards.items()}
    return known, paid
