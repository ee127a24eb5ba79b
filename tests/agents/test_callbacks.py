from pathlib import Path
from typing import Any

import gymnasium
import pytest
from stable_baselines3 import PPO, TD3
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.callbacks import StudentEvaluation
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import Evaluation
from mtkd_env.optimization import Recipe
from mtkd_env.wrappers.sb3 import SB3VecEnv
from tiny import NUM_ENVS, STEPS_PER_EPOCH, make_tiny_env

SAMPLES = STEPS_PER_EPOCH * NUM_ENVS  # of an epoch


def model_in(env: Any, **arguments: Any) -> PPO:
    """A model whose rollouts do not fit the student's epochs."""
    return PPO("MlpPolicy", env, n_steps=3, batch_size=6, seed=0, device="cpu", **arguments)


def evaluations_of(env: MTKDVectorEnv, split: str = "test") -> list[Evaluation]:
    """Collects evaluations after every epoch of the student."""
    found: list[Evaluation] = []

    def after(record: Any) -> None:
        if (record.step + 1) % STEPS_PER_EPOCH == 0:
            found.append(env.evaluate(split))

    env.subscribe(after)
    return found


@pytest.mark.parametrize("episode", ["batch", "epoch", "training"])
@pytest.mark.parametrize("wrap", [SB3VecEnv, lambda env: VecNormalize(VecMonitor(SB3VecEnv(env)))])
def test_the_student_is_evaluated_at_the_end_of_every_epoch(wrap: Any, episode: str) -> None:
    env = make_tiny_env(episode=episode, recipe=Recipe(epochs=2, lr=0.1))
    expected = evaluations_of(env)
    callback = StudentEvaluation()
    model_in(wrap(env)).learn(3 * SAMPLES, callback=callback)
    assert len(callback.evaluations) == 3
    assert callback.evaluations == expected
    assert len({evaluation.cross_entropy for evaluation in expected}) == 3


def test_evaluations_are_logged_where_the_epochs_end(tmp_path: Path) -> None:
    model = model_in(SB3VecEnv(make_tiny_env()))
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    callback = StudentEvaluation()
    model.learn(3 * SAMPLES, callback=callback, log_interval=1)
    model.logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("accuracy", "cross_entropy"):
        logged = events.Scalars(f"student/{name}")
        assert [event.step for event in logged] == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]
        expected = [getattr(evaluation, name) for evaluation in callback.evaluations]
        assert [event.value for event in logged] == pytest.approx(expected)


def test_off_policy_algorithms_have_their_student_evaluated_too() -> None:
    env = SB3VecEnv(make_tiny_env())
    callback = StudentEvaluation()
    model = TD3("MlpPolicy", env, learning_starts=4, batch_size=4, buffer_size=64, device="cpu")
    model.learn(2 * SAMPLES, callback=callback)
    assert len(callback.evaluations) == 2


def test_any_split_may_be_evaluated() -> None:
    env = make_tiny_env()
    expected = evaluations_of(env, "train")
    callback = StudentEvaluation("train")
    model_in(SB3VecEnv(env)).learn(SAMPLES, callback=callback)
    assert callback.evaluations == expected


def test_a_callback_counts_on_in_a_second_call_and_rests_in_between() -> None:
    env = make_tiny_env()
    model, callback = model_in(SB3VecEnv(env)), StudentEvaluation()
    for _ in range(2):
        model.learn(3 * SAMPLES, callback=callback, reset_num_timesteps=False)
    assert len(callback.evaluations) == 6
    for _ in range(STEPS_PER_EPOCH):
        env.step(env.action_space.sample())
    assert len(callback.evaluations) == 6


def test_an_unknown_split_is_named_before_anything_is_trained() -> None:
    env = make_tiny_env()
    with pytest.raises(ConfigError, match=r"unknown split 'tets'; did you mean 'test'\?"):
        model_in(SB3VecEnv(env)).learn(SAMPLES, callback=StudentEvaluation("tets"))
    assert env.steps == 0


def test_an_environment_without_a_student_is_refused() -> None:
    env = DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")] * 2)
    with pytest.raises(TypeError, match=r"expected an SB3VecEnv, got <.*DummyVecEnv"):
        model_in(env).learn(6, callback=StudentEvaluation())
