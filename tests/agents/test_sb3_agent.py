import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from agents import SB3Agent, algorithm_class, build_agent, check_agent
from experiments.config import parse_arguments
from experiments.run import main
from known_optimum import ignore, known_env, scores, started_env
from mtkd_env.action import generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.optimization import Recipe
from mtkd_env.seeding import random_states
from tiny import NUM_ENVS, STEPS_PER_EPOCH, TEACHERS, make_tiny_env, seldom

M = len(TEACHERS)

# Enough steps for every shipped configuration to learn in the first of two epochs.
LONG = {"steps": 12, "num_envs": 16}

SHIPPED = ["ppo", "a2c", "ddpg", "td3", "sac"]
try:
    import sb3_contrib
except ImportError:
    CONTRIB = []
else:
    CONTRIB = ["trpo", "tqc", "crossq", "ars"]
    assert sb3_contrib

# What the shipped configurations need to fit a batch of 16 samples.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "tqc": {"learning_starts": 64},
    "crossq": {"learning_starts": 64},
    "ars": {"n_delta": 4},
}


def arguments_of(name: str) -> dict[str, Any]:
    (config,) = parse_arguments(["--algo", name])
    return {**config.agent.arguments, **ARGUMENTS.get(name, {})}


def build(name: str, env: MTKDVectorEnv, *, seed: int = 0, **changes: Any) -> SB3Agent:
    agent = build_agent(name, env, seed=seed, arguments={**arguments_of(name), **changes})
    assert isinstance(agent, SB3Agent)
    return agent


def quick(env: MTKDVectorEnv, algorithm: str = "ppo", **arguments: Any) -> SB3Agent:
    """An agent without shipped arguments, cheap to build."""
    on_policy = {"n_steps": 2, "n_minibatches": 1, "n_epochs": 1} if algorithm == "ppo" else {}
    return SB3Agent(env, algorithm, **{**on_policy, **arguments})


def parameters(agent: SB3Agent) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in agent.model.policy.parameters()])


def student(env: MTKDVectorEnv) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in env.distiller.student.parameters()])


# Every algorithm.


@pytest.mark.parametrize("name", seldom(SHIPPED + CONTRIB, {"ppo", "sac"}))
def test_algorithms_learn_from_epochs_of_the_student(name: str) -> None:
    env = started_env(**LONG)
    agent = build(name, env)
    before, student_before = parameters(agent), student(env)
    ends: list[int] = []
    agent.learn(2, lambda: ends.append(env.steps))
    assert ends == [12, 24]
    assert env.steps == 24
    assert agent.model.num_timesteps == 24 * 16
    assert not student(env).equal(student_before)
    assert not parameters(agent).equal(before)
    assert parameters(agent).isfinite().all()
    action = agent.act(env.observation)
    assert action.shape == (16, 2 * M)
    assert action.abs().max() <= env.single_action_space.high[0]
    assert not action.requires_grad


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ppo", {"n_steps": 5, "n_minibatches": 1, "n_epochs": 1}),
        ("ppo", {"n_steps": 2, "n_minibatches": 1, "n_epochs": 1}),
        ("a2c", {"n_steps": 4}),
        ("td3", {"train_freq": 2, "learning_starts": 4, "batch_size": 4}),
    ],
    ids=str,
)
def test_epochs_end_exactly_whatever_the_length_of_a_rollout(
    name: str, arguments: dict[str, Any]
) -> None:
    env = started_env(steps=3)
    agent = build(name, env, **arguments)
    ends: list[int] = []
    agent.learn(2, lambda: ends.append(env.steps))
    agent.learn(1, lambda: ends.append(env.steps))
    assert ends == [3, 6, 9]
    assert env.steps == 9
    assert agent.model.num_timesteps == 9 * NUM_ENVS


def test_every_step_executes_the_policy_s_answer_to_the_batch_that_waits() -> None:
    env = started_env(fusion="generator")
    agent = quick(env, "ddpg", learning_starts=0, batch_size=4, buffer_size=64)
    expected: list[Tensor] = []
    executed: list[Tensor] = []
    distill = env.distill

    def spy(weights: Any) -> Any:
        expected.append(generated_weights(agent.act(env.observation)).logit)
        executed.append(weights.logit)
        return distill(weights)

    env.distill = spy
    agent.learn(1, ignore)
    # A second call must not act on what the first one saw last.
    agent.learn(1, ignore)
    assert len(executed) == 2 * env.steps_per_epoch
    torch.testing.assert_close(executed, expected)


def test_learning_goes_on_with_the_student_that_is_there() -> None:
    envs = started_env(), started_env()
    agents = [quick(env, seed=seed) for seed, env in enumerate(envs)]
    for env in envs:
        for _ in range(2):
            env.distill(env.to_weights(torch.zeros(NUM_ENVS, 2 * M)))
    before = student(envs[0])
    seen: list[int] = []
    envs[0].subscribe(lambda record: seen.append(record.step))
    agents[0].vec_env.reset()
    assert student(envs[0]).equal(before)
    # The student and its data are the environment's, whatever the algorithm's seed.
    assert student(envs[1]).equal(before)
    assert envs[0].observation.equal(envs[1].observation)
    agents[0].learn(1, ignore)
    assert seen[0] == 2


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_same_seed_gives_the_same_agent_and_student(name: str) -> None:
    def learned(seed: int) -> tuple[Tensor, Tensor]:
        env = started_env(**LONG)
        agent = build(name, env, seed=seed)
        agent.learn(2, ignore)
        return parameters(agent), student(env)

    first, second, other = learned(1), learned(1), learned(2)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
    assert not first[0].equal(other[0])


@pytest.mark.parametrize("kwargs", [{"episode": "epoch"}, {"observation_dtype": "float16"}])
def test_other_episodes_and_precisions_work_too(kwargs: dict[str, Any]) -> None:
    env = started_env(**kwargs)
    agent = quick(env)
    agent.learn(2, ignore)
    assert env.steps == 2 * env.steps_per_epoch
    assert parameters(agent).isfinite().all()


def test_ppo_finds_the_one_best_teacher() -> None:
    agent = quick(
        known_env(num_envs=16), learning_rate=5e-3, n_steps=3, n_epochs=10, n_minibatches=1
    )
    found = scores(agent, 20)
    assert abs(found[0]) < 0.2
    assert found[-1] > 0.5


# What they leave alone.


def global_state() -> tuple[Any, ...]:
    """The generators, and cuDNN's flags; beartype, which checks shapes, draws from Python's own."""
    states = random_states()
    name, key, *rest = states["numpy"]
    cudnn = torch.backends.cudnn
    return name, key.tolist(), rest, states["cpu"].tolist(), cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_global_generators_and_flags_stay_as_they_were(name: str) -> None:
    env = started_env()
    small = {"learning_starts": 4, "batch_size": 4} if name == "sac" else {}
    with torch.backends.cudnn.flags(deterministic=False, benchmark=True):
        before = global_state()
        agent = quick(env, name, **small)
        assert global_state() == before
        agent.learn(2, ignore)
        assert global_state() == before


def test_what_others_draw_between_two_epochs_does_not_matter() -> None:
    learned = []
    for disturbed in (False, True):
        env = started_env()
        agent = quick(env)
        agent.learn(1, ignore)
        if disturbed:
            random.seed(1)
            np.random.seed(1)  # noqa: NPY002 - what Stable-Baselines3 draws from
            torch.manual_seed(1)
        agent.learn(1, ignore)
        learned.append(parameters(agent))
    assert learned[0].equal(learned[1])


# Divergence.


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ppo", {"learning_rate": 1e30, "max_grad_norm": 1e30, "n_steps": 2}),
        ("a2c", {"learning_rate": 1e30, "max_grad_norm": 1e30}),
        ("td3", {"learning_rate": 1e20, "learning_starts": 1, "gradient_steps": 8}),
        ("sac", {"learning_rate": 1e20, "learning_starts": 1, "gradient_steps": 8}),
    ],
)
def test_an_agent_that_diverges_is_named_with_the_step(
    name: str, arguments: dict[str, Any]
) -> None:
    env = started_env(**LONG)
    agent = build(name, env, **arguments)
    message = rf"agent: {name} became NaN or infinite by step \d+ of the student; .*learning_rate"
    with pytest.raises(FloatingPointError, match=message) as error:
        agent.learn(3, ignore)
    assert "\n" not in str(error.value)
    assert env.steps < 36


def test_an_agent_whose_last_update_diverges_is_named_at_the_end_of_the_epoch() -> None:
    env = started_env()
    agent = quick(env, "a2c", n_steps=100)

    def spoil(_: Any) -> None:
        next(agent.model.policy.parameters()).data.fill_(np.inf)

    env.subscribe(lambda record: spoil(record) if record.step == env.steps_per_epoch - 1 else None)
    with pytest.raises(FloatingPointError, match=r"a2c became NaN or infinite by step 3"):
        agent.learn(1, ignore)


def test_a_student_that_diverges_is_not_blamed_on_the_agent() -> None:
    env = started_env(recipe=Recipe(epochs=4, lr=1e20))
    agent = quick(env, "ppo", n_steps=1)
    with pytest.raises(FloatingPointError, match=r"observations of ppo .* student, which has div"):
        agent.learn(4, ignore)


def test_other_errors_of_an_algorithm_stay_what_they_are() -> None:
    env = started_env()
    agent = quick(env)

    def fail() -> None:
        raise ValueError("something else")

    with pytest.raises(ValueError, match=r"^something else$"):
        agent.learn(1, fail)
    ends: list[int] = []
    agent.learn(1, lambda: ends.append(env.steps))
    assert ends == [6]


# Episodes of other lengths.


@pytest.mark.parametrize("name", ["ppo", "td3"])
def test_the_student_of_an_episode_of_a_training_is_evaluated_before_the_next_one_follows(
    name: str,
) -> None:
    env = make_tiny_env(episode="training", recipe=Recipe(epochs=2, lr=0.1))
    env.reset(seed=0)
    on_policy = {"n_steps": 2, "n_minibatches": 1}
    agent = build(name, env, **(on_policy if name == "ppo" else {"batch_size": 4}))
    seen: list[tuple[int, Tensor]] = []
    agent.learn(4, lambda: seen.append((env.steps // STEPS_PER_EPOCH, student(env))))
    assert [epoch for epoch, _ in seen] == [1, 2, 1, 2]
    # The last student is there, not the one that would follow.
    assert student(env).equal(seen[-1][1])
    assert agent.model.num_timesteps == 4 * STEPS_PER_EPOCH * NUM_ENVS


def test_students_are_evaluated_before_their_next_batch_is_drawn() -> None:
    """As under every other method; running statistics would know one batch more."""
    env = started_env()
    evaluated: list[dict[str, Tensor]] = []

    def keep() -> None:
        module = env.distiller.module
        evaluated.append({name: tensor.clone() for name, tensor in module.state_dict().items()})

    quick(env).learn(1, keep)
    (found,) = evaluated
    kept = env.distiller.module.state_dict()
    assert all(tensor.equal(kept[name]) for name, tensor in found.items())


# Arguments.


def test_numbers_may_be_given_in_epochs() -> None:
    env = started_env(steps=4)
    agent = quick(env, n_steps="2 epochs")
    assert agent.model.n_steps == 8
    assert agent.model.batch_size == 8 * NUM_ENVS
    agent = quick(
        env,
        "td3",
        train_freq="0.5 epochs",
        gradient_steps="1 epoch",
        learning_starts="1.5 epochs",
        batch_size="0.5 epochs",
        buffer_size="5 epochs",
    )
    model = agent.model
    assert model.train_freq.frequency == 2
    assert model.gradient_steps == 4
    # Samples, not steps.
    assert model.learning_starts == 6 * NUM_ENVS
    assert model.batch_size == 2 * NUM_ENVS
    assert model.replay_buffer.buffer_size * model.n_envs == 20 * NUM_ENVS


@pytest.mark.parametrize(
    ("num_envs", "count", "expected"), [(4, 4, 3), (4, 1, 12), (5, 2, 8), (5, 4, 4), (7, 21, 1)]
)
def test_rollouts_are_split_into_so_many_minibatches(
    num_envs: int, count: int, expected: int
) -> None:
    env = started_env(num_envs=num_envs)
    agent = quick(env, n_steps=3, n_minibatches=count, normalize_advantage=False)
    assert agent.model.batch_size == expected


@pytest.mark.parametrize("name", ["ppo", *(["trpo"] if CONTRIB else [])])
def test_shipped_minibatches_fit_a_batch_of_odd_size(name: str) -> None:
    env = started_env(steps=11, num_envs=7)
    agent = build(name, env)
    agent.learn(1, ignore)
    assert agent.model.batch_size == 39  # of 77 samples
    assert parameters(agent).isfinite().all()


def test_a_batch_size_that_does_not_fit_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="mini-batch size of 5"):
        SB3Agent(started_env(), "ppo", n_steps=2, batch_size=5)


@pytest.mark.parametrize(
    ("noise_type", "kind"),
    [("normal", NormalActionNoise), ("ornstein-uhlenbeck", OrnsteinUhlenbeckActionNoise)],
)
def test_noise_is_given_by_its_size(noise_type: str, kind: type) -> None:
    agent = quick(started_env(), "ddpg", noise_type=noise_type, noise_std=0.3)
    noise = agent.model.action_noise
    assert isinstance(noise, kind)
    assert noise._sigma.tolist() == [0.3] * (2 * M)
    agent.model.learning_starts = 0
    agent.learn(1, ignore)
    assert quick(started_env(), "ddpg").model.action_noise is None


def test_policies_are_described_by_plain_values() -> None:
    given = {"net_arch": [8], "activation_fn": "ELU"}
    agent = quick(started_env(), policy_kwargs=given)
    kinds = {type(module) for module in agent.model.policy.modules()}
    assert nn.ELU in kinds
    assert nn.Tanh not in kinds
    assert given == {"net_arch": [8], "activation_fn": "ELU"}


def test_the_algorithm_runs_on_the_environments_device_unless_told_otherwise() -> None:
    env = started_env()
    own = f"{__name__}:OwnAlgorithm"
    assert quick(env, own, n_steps=2, n_minibatches=1).model.asked_for == env.device
    assert quick(env, own, n_steps=2, n_minibatches=1, device="meta").model.asked_for == "meta"


@pytest.mark.parametrize(
    ("algorithm", "arguments", "message"),
    [
        ("ppo", {"n_epochs": "1 epoch"}, "agent.arguments.n_epochs: cannot be given in epochs"),
        ("ppo", {"n_minibatches": 9}, "n_minibatches: expected 1 to 8, the number of .* got 9"),
        ("ppo", {"n_minibatches": 0}, "n_minibatches: expected 1 to 8"),
        ("td3", {"n_minibatches": 2}, "n_minibatches: needs n_steps, which is not given"),
        ("ppo", {"n_steps": "0.01 epochs"}, "n_minibatches|ppo cannot be built"),
        ("ppo", {"noise_std": 0.1}, "ppo cannot be built.*action_noise"),
        ("ddpg", {"noise_std": 0.1, "noise_type": "norml"}, "noise_type.*did you mean 'normal'"),
        ("ppo", {"policy": "MlpPolcy"}, "ppo cannot be built.*MlpPolcy"),
        (
            "ppo",
            {"policy_kwargs": {"activation_fn": "Relu"}},
            "activation_fn: torch.nn has no module",
        ),
        ("ppo", {"learning_rat": 1e-3}, "ppo cannot be built.*learning_rat"),
        ("dqn", {}, "dqn cannot be built.*Discrete"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_named(
    algorithm: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        quick(started_env(), algorithm, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SACC", {}, "did you mean 'sac'?"),
        ("ppo", {"learning_rat": 1}, "agent.arguments.learning_rat: unknown key; did you mean 'l"),
        ("td3", {"n_steps_": 1}, "agent.arguments.n_steps_: unknown key; did you mean 'n_steps'?"),
        ("stable_baselines3:PPOO", {}, "has no attribute 'PPOO'; did you mean 'PPO'"),
        ("no_such_module:PPO", {}, "cannot load 'no_such_module:PPO': No module named"),
        ("gymnasium:make", {}, "'gymnasium:make' is not a class of Agent, of Weighting or of a"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_agent(name, arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_own_arguments_pass_the_check() -> None:
    check_agent("ppo", {"noise_std": 0.1, "n_minibatches": 2, "policy_kwargs": {}})


@pytest.mark.parametrize("name", ["ppo", "PPO", "Ppo", "stable_baselines3:PPO"])
def test_algorithms_are_found_by_name(name: str) -> None:
    assert algorithm_class(name) is stable_baselines3.PPO


class OwnAlgorithm(stable_baselines3.PPO):
    """An algorithm of the user's own."""

    def __init__(self, *args: Any, device: Any = "auto", **kwargs: Any) -> None:
        super().__init__(*args, device="cpu", **kwargs)
        self.asked_for = device


@pytest.mark.parametrize("name", ["tqc", "crossq", "ars", "trpo"])
def test_a_missing_package_is_named_with_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    monkeypatch.delitem(sys.modules, "agents.ars", raising=False)
    (config,) = parse_arguments(["--algo", name])
    with pytest.raises(ConfigError, match=rf"'{name}': needs sb3_contrib.*mtkd-env\[contrib\]"):
        check_agent(name, config.agent.arguments)
    assert main(["--algo", name]) == 2
    assert algorithm_class("ppo") is stable_baselines3.PPO


# ARS.


@pytest.fixture
def _contrib() -> None:
    pytest.importorskip("sb3_contrib")


@pytest.mark.usefixtures("_contrib")
class TestARS:
    """Candidates share each batch; nothing is evaluated."""

    def test_every_candidate_acts_on_its_share_of_the_samples(self) -> None:
        env = started_env(num_envs=5, fusion="generator")
        agent = SB3Agent(env, "ars", policy="LinearPolicy", n_delta=2)
        model = agent.model
        observations = env.observation.numpy()
        model._last_obs = observations
        weights = torch.arange(4.0).unsqueeze(1) / 1000 * torch.ones(model.n_params)
        actions = model._actions(weights)
        expected = observations.sum(1)
        for row, candidate in enumerate([0, 1, 2, 3, 0]):
            bounded = np.clip(candidate / 1000 * expected[row], -3, 3)
            assert np.allclose(actions[row], bounded, atol=1e-4)

    def test_a_candidate_s_return_is_the_mean_reward_of_its_samples(self) -> None:
        env = started_env(num_envs=5)
        agent = SB3Agent(env, "ars", policy="LinearPolicy", n_delta=2)
        model = agent.model
        rewards = np.array([1.0, 2.0, 3.0, 4.0, 5.0], dtype=np.float32)
        step = agent.vec_env.step

        def pay(actions: np.ndarray) -> Any:
            observations, _, dones, infos = step(actions)
            return observations, rewards, dones, infos

        agent.vec_env.step = pay
        found: list[Tensor] = []
        evaluate = model.evaluate_candidates

        def spy(*arguments: Any) -> Tensor:
            found.append(evaluate(*arguments))
            return found[-1]

        model.evaluate_candidates = spy
        agent.learn(1, ignore)
        assert found[0].tolist() == [3.0, 2.0, 3.0, 4.0]
        # One update a step, but for the step that ends the last epoch.
        assert model._n_updates == env.steps - 1

    def test_it_finds_the_one_best_teacher(self) -> None:
        env = known_env(num_envs=16)
        agent = SB3Agent(
            env, "ars", policy="LinearPolicy", n_delta=8, policy_kwargs={"with_bias": True}
        )
        found = scores(agent, 20)
        assert abs(found[0]) < 0.2
        assert found[-1] > 0.4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n_delta": 3}, "n_delta: 3 makes 6 candidates, which need as many samples.* got 4"),
            ({"n_delta": 2, "n_eval_episodes": 4}, "n_eval_episodes.* have no effect here"),
            ({"n_delta": 2, "alive_bonus_offset": 1}, "alive_bonus_offset: have no effect here"),
        ],
        ids=str,
    )
    def test_arguments_without_a_meaning_are_refused(
        self, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            SB3Agent(started_env(), "ars", **arguments)

    def test_the_library_s_own_is_refused_because_it_evaluates(self) -> None:
        env = started_env()
        agent = SB3Agent(env, "sb3_contrib:ARS", n_delta=2)
        with pytest.raises(RuntimeError, match=r"every step trains its student"):
            agent.learn(1, ignore)
        assert env.steps == 0


# Files.


@pytest.mark.parametrize("name", ["ppo", *(["ars"] if CONTRIB else [])])
def test_saved_agents_are_read_by_the_algorithms_own_load(name: str, tmp_path: Path) -> None:
    env = started_env()
    agent = quick(env, name, **({"n_delta": 2} if name == "ars" else {}))
    agent.learn(1, ignore)
    agent.save(tmp_path)
    library = stable_baselines3.PPO if name == "ppo" else sb3_contrib.ARS
    loaded = library.load(tmp_path / "agent.zip", device="cpu")
    observation = env.observation
    action, _ = loaded.predict(observation.numpy(), deterministic=True)
    assert np.array_equal(action, agent.act(observation).numpy())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"agent.json", "agent.safetensors", "agent.zip"}


def test_what_the_algorithm_logs_is_written_once_an_epoch(tmp_path: Path) -> None:
    env = started_env()
    agent = quick(env)
    agent.log_to(tmp_path)
    agent.learn(3, ignore)
    agent.model.logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    samples = env.steps_per_epoch * NUM_ENVS
    steps = [event.step for event in events.Scalars("train/loss")]
    assert set(steps) <= {samples, 2 * samples, 3 * samples}


# The shipped configurations on the digits, with a student that stands still.

REACHED = {
    "pg": 0.85,
    "reinforce": 0.85,
    "dpg": 0.9,
    "ppo": 0.75,
    "a2c": 0.5,
    "ddpg": 0.5,
    "td3": 0.5,
    "sac": 0.5,
}
if CONTRIB:
    REACHED |= {"tqc": 0.8, "crossq": 0.8}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_shipped_configurations_find_a_known_optimum_on_real_images(
    name: str, tmp_path: Path
) -> None:
    still = ["--optimizer.lr", "0", "--env.fusion", "generator", "--optimizer.epochs", "30"]
    assert main(["--algo", name, *still, "--output", str(tmp_path), "--device", "cpu"]) == 0
    (found,) = tmp_path.glob("*/result.json")
    assert json.loads(found.read_text())["score"] >= REACHED[name]
