"""Tunes the agent `pg` by Optuna, which ends a trial where most others did better by that epoch.

python experiments/examples/optuna_pg.py --trials 20 --epochs 10

Trains a student on the digits a trial, and judges it by validation images; the test images are not
looked at. Prints every trial and the best arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium

import mtkd_env
from agents import build_agent

if TYPE_CHECKING:
    import optuna


def make_env(epochs: int) -> mtkd_env.MTKDVectorEnv:
    """The digits, a fifth of them for validation; the reward says what helps the true class."""
    made: Any = gymnasium.make_vec(
        "MTKD/Digits-v0",
        num_envs=64,
        data={"val_fraction": 0.2},
        reward="alignment",
        fusion="generator",
        epochs=epochs,
        device="cpu",
    )
    return made


def tune(env: mtkd_env.MTKDVectorEnv, epochs: int, trials: int, seed: int) -> "optuna.Study":
    """So many trials, each with a new student of the same seed."""
    import optuna

    def accuracy(trial: optuna.Trial) -> float:
        arguments = {
            "lr": trial.suggest_float("lr", 1e-4, 3e-2, log=True),
            "entropy_coef": trial.suggest_float("entropy_coef", 0.0, 0.5),
            "passes": trial.suggest_int("passes", 1, 8),
        }
        env.reset(seed=seed)

        def end_epoch() -> None:
            trial.report(env.evaluate("val").accuracy, env.steps // env.steps_per_epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        build_agent("pg", env, seed=seed, arguments=arguments).learn(epochs, end_epoch)
        return env.evaluate("val").accuracy

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=2),
    )
    study.optimize(accuracy, n_trials=trials)
    return study


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; gives its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10, help="of each student")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    try:
        study = tune(make_env(given.epochs), given.epochs, given.trials, given.seed)
    except ModuleNotFoundError as error:
        parser.error(f"{error}; install it with pip install 'mtkd-env[optuna]'")
    sys.stdout.write(f"best: {100 * study.best_value:.2f} % with {study.best_params}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
