"""Several processes that train one student, in the same two for all tests."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents import Agent, SB3Agent, build_agent
from agents.callbacks import StudentEvaluation
from agents.policy_gradient import LearningAgent
from mtkd_env import ConfigError, MTKDVectorEnv, Recipe, distributed, losses
from mtkd_env.data import BatchStream
from mtkd_env.seeding import seeded
from mtkd_env.teachers.training import TeacherTraining
from processes import Pair, two_processes
from tiny import NUM_ENVS, TinyNetwork, make_tiny_env, seldom, training_set

ROWS, WIDTH = 6, 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes in one group; to start them takes seconds."""
    with two_processes(tmp_path_factory.mktemp("group")) as processes:
        yield processes


# What they tell each other.


def batch(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def test_a_single_process_gets_back_what_it_gave() -> None:
    values, module = batch(WIDTH), nn.BatchNorm1d(WIDTH)
    assert not distributed.active()
    assert (distributed.rank(), distributed.processes()) == (0, 1)
    for together in (
        distributed.total,
        distributed.mean,
        distributed.gather,
        distributed.broadcast,
    ):
        assert together(values) is values
    assert torch.equal(distributed.local_part(values), values)
    assert distributed.agree("yes") == "yes"
    assert distributed.data_parallel(module) is module
    assert distributed.synchronize_norms(module) is module


def _collectives() -> dict[str, object]:
    number = distributed.rank()
    own = torch.full((2, 1), float(number))
    return {
        "rank": number,
        "total": distributed.total(own).tolist(),
        "mean": distributed.mean(own).tolist(),
        "gather": distributed.gather(own).tolist(),
        "broadcast": distributed.broadcast(own).tolist(),
        "agree": distributed.agree(f"process {number}"),
        "own": own.tolist(),
        "part": distributed.local_part(torch.arange(4)).tolist(),
    }


def test_processes_meet(pair: Pair) -> None:
    results = pair(_collectives)
    for number, result in enumerate(results):
        assert result.pop("own") == [[number], [number]]
        assert result.pop("rank") == number
        assert result.pop("part") == [2 * number, 2 * number + 1]
    together = {
        "total": [[1], [1]],
        "mean": [[0.5], [0.5]],
        "gather": [[0], [0], [1], [1]],
        "broadcast": [[0], [0]],
        "agree": "process 0",
    }
    assert results == [together, together]


def _norm_layers(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    if len(shape) == 1:
        return nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2)).double()
    layers = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 2, 1), nn.BatchNorm2d(2))
    return layers.double()


def _loss(module: nn.Module, rows: Tensor) -> Tensor:
    # Not symmetric in the rows, so that a mistake in the exchange of gradients shows.
    return (module(rows).pow(3).flatten(1).sum(1) * rows.flatten(1)[:, 0]).mean()


def _train_in_parts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    module = distributed.synchronize_norms(_norm_layers(shape))
    parallel = distributed.data_parallel(module)
    rows = distributed.local_part(batch(*shape)).clone().requires_grad_()
    loss = _loss(parallel, rows)
    loss.backward()
    assert rows.grad is not None
    gradients = {f"{name}.grad": p.grad.clone() for name, p in module.named_parameters()}
    found = {**module.state_dict(), **gradients, "loss": distributed.mean(loss)}
    return {**found, "rows": distributed.gather(rows.grad) / distributed.processes()}


@pytest.mark.parametrize("shape", [(WIDTH,), (WIDTH, 4, 5)], ids=str)
def test_a_batch_in_two_parts_has_the_gradients_and_statistics_of_the_whole(
    pair: Pair, shape: tuple[int, ...]
) -> None:
    module, rows = _norm_layers(shape), batch(*shape).requires_grad_()
    loss = _loss(module, rows)
    loss.backward()
    gradients = {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    expected = {**module.state_dict(), **gradients, "loss": loss.detach(), "rows": rows.grad}
    for found in pair(_train_in_parts, shape):
        torch.testing.assert_close(found, expected)


def _dist_in_parts(rows: Tensor, teachers: Tensor, weights: Tensor) -> Tensor:
    """Gradient of a batch's weighted DIST loss with respect to the student's logits."""
    own = distributed.local_part(rows).clone().requires_grad_()
    theirs = distributed.local_part(teachers.transpose(0, 1)).transpose(0, 1)
    loss = losses.dist_divergence(own, theirs, 2.0) * distributed.local_part(weights)
    loss.sum(1).mean().backward()
    assert own.grad is not None
    return distributed.gather(own.grad) / distributed.processes()


def test_dist_compares_the_samples_of_all_processes(pair: Pair) -> None:
    rows, weights = batch(WIDTH), batch(2).softmax(1)
    teachers = torch.stack([batch(WIDTH).roll(1, 0), batch(WIDTH).roll(2, 1)])
    expected = _dist_in_parts(rows, teachers, weights)
    for found in pair(_dist_in_parts, rows, teachers, weights):
        torch.testing.assert_close(found, expected)


def _average() -> tuple[list[float], bool]:
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    used.grad = torch.tensor([1.0, 2.0]) * (1 + 2 * distributed.rank())
    distributed.average_gradients([used, unused])
    return used.grad.tolist(), unused.grad is None


def test_gradients_are_averaged(pair: Pair) -> None:
    assert pair(_average) == [([2.0, 4.0], True)] * 2


class _Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.used(inputs)
        return outputs


def _lacking() -> str:
    module = _Spare()
    distributed.data_parallel(module)(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ConfigError) as error:
        distributed.check_gradients(module)
    return str(error.value)


def test_parameters_that_a_forward_does_not_use_are_named(pair: Pair) -> None:
    for said in pair(_lacking):
        assert "of _Spare does not use spare.weight, spare.bias; remove" in said


def _evaluate_norm() -> Tensor:
    module = distributed.synchronize_norms(_norm_layers((WIDTH,))).eval()
    return module(batch(WIDTH)).detach()


def test_synchronised_norms_evaluate_as_plain_ones_do(pair: Pair) -> None:
    expected = _norm_layers((WIDTH,)).eval()(batch(WIDTH))
    for found in pair(_evaluate_norm):
        torch.testing.assert_close(found, expected)


# Training.

EPOCHS = 2

# Arguments that let every algorithm learn within two epochs of four steps. Not by Adam where there
# is a choice: it makes steps of the same size of gradients that are nothing but rounding.
AGENTS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "aver": {},
    "camkd": {},
    "aekd": {},
    "amtmlkd": {},
    "pg": {"optimizer": "sgd", "lr": 1.0},
    "reinforce": {"optimizer": "sgd", "lr": 0.1},
    "dpg": {"optimizer": "sgd", "lr": 0.1, "critic_lr": 0.1},
    "ppo": {"n_steps": 2, "batch_size": 4, "gamma": 0.0},
    "td3": {"learning_starts": 8, "batch_size": 8, "buffer_size": 64, "noise_std": 0.1},
}


def stream() -> BatchStream:
    return training_set(4 * NUM_ENVS).stream(NUM_ENVS, torch.device("cpu"), 0)


def make_env(**kwargs: Any) -> MTKDVectorEnv:
    env = make_tiny_env(batches=stream(), recipe=Recipe(epochs=EPOCHS, lr=0.05), **kwargs)
    images = training_set(4 * NUM_ENVS)
    test = partial(images.evaluation_batches, images.splits.test, "cpu")
    env.splits = {"test": test}
    env.reset(seed=0)
    return env


def make_agent(name: str, env: MTKDVectorEnv, **arguments: Any) -> Agent:
    return build_agent(name, env, seed=0, arguments=AGENTS[name] | arguments)


def _train(name: str, arguments: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    env = make_env(**kwargs)
    agent = make_agent(name, env, **(arguments or {}))
    agent.warm_up(env.steps_per_epoch)
    agent.learn(EPOCHS - 1, lambda: None)
    evaluation = env.evaluate()
    own = isinstance(agent, LearningAgent)
    return {
        "policy": agent.policy.state_dict() if own else {},
        "student": env.distiller.module.state_dict(),
        "observations": env.normalizer and env.normalizer.state_dict(),
        "accuracy": evaluation.accuracy,
        "cross_entropy": evaluation.cross_entropy,
        "samples": env.num_envs,
    }


# Take the same way between the processes as others that are quick to compare.
ALIKE = ("uniform", "aver", "amtmlkd", "reinforce", "td3")


@pytest.mark.parametrize(
    "name",
    seldom(AGENTS, {*AGENTS} - {*ALIKE}),
)
def test_two_processes_train_the_student_of_one(pair: Pair, name: str) -> None:
    alone = _train(name)
    assert alone.pop("samples") == NUM_ENVS
    together = pair(_train, name)
    for result in together:
        assert result.pop("samples") == NUM_ENVS // 2
        torch.testing.assert_close(result, alone, rtol=1e-3, atol=1e-4)
    assert all(
        torch.equal(tensor, together[1]["student"][key])
        for key, tensor in together[0]["student"].items()
        if "running" not in key
    )


@pytest.mark.parametrize(
    "kwargs", [{"feature": "none"}, {"reward": "improvement"}, {"logit": "dist"}], ids=str
)
def test_two_processes_train_under_other_losses_and_rewards(
    pair: Pair, kwargs: dict[str, Any]
) -> None:
    alone = _train("uniform", **kwargs)["student"]
    for result in pair(partial(_train, "uniform", **kwargs)):
        torch.testing.assert_close(result["student"], alone, rtol=1e-3, atol=1e-4)


# What is drawn of the labelled images is the same in both; `gate` is fitted by each alone.
PAID = {
    "heldout": {"reward": "heldout", "heldout_size": 5},
    "cross": {"reward": "cross"},
    "gated": {"reward": "heldout", "fusion": "prior", "prior": "gate"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAID)
def test_two_processes_are_paid_by_labelled_images_as_one_is(pair: Pair, kind: str) -> None:
    likelihood = {"likelihood": 1.0, "likelihood_size": 6}
    train = partial(_train, "pg", likelihood, observation="label_free", **PAID[kind])
    alone = train()
    for found in pair(train):
        for part in ("policy", "student"):
            torch.testing.assert_close(found[part], alone[part], rtol=1e-3, atol=1e-4)


def _go_on(name: str, folder: str) -> dict[str, Tensor]:
    """Trains in two parts, the second one from what process 0 kept of the first."""
    first = make_env()
    agent = make_agent(name, first)
    path = Path(folder) / "state.pt"

    class EnoughError(Exception):
        pass

    def keep() -> None:
        if first.steps == 3:
            state = {"env": first.state_dict(), "agent": agent.state_dict()}
            if distributed.rank() == 0:
                torch.save(state, path)
            raise EnoughError

    with pytest.raises(EnoughError):
        agent.learn(EPOCHS, lambda: None, keep)
    state = distributed.agree(torch.load(path) if distributed.rank() == 0 else None)
    env = make_env()
    env.load_state_dict(state["env"])
    agent = make_agent(name, env)
    agent.load_state_dict(state["agent"])
    agent.learn(EPOCHS, lambda: None)
    return env.distiller.module.state_dict()


def _go_through(name: str) -> dict[str, Tensor]:
    env = make_env()
    make_agent(name, env).learn(EPOCHS, lambda: None)
    return env.distiller.module.state_dict()


@pytest.mark.parametrize("name", ["aver", "pg"])
def test_two_processes_go_on_from_what_process_0_kept(
    pair: Pair, tmp_path: Path, name: str
) -> None:
    through = pair(_go_through, name)
    torch.testing.assert_close(pair(_go_on, name, str(tmp_path)), through, rtol=1e-4, atol=1e-5)


def _train_teacher() -> dict[str, Tensor]:
    with seeded(0):
        network = TinyNetwork()
    TeacherTraining(network, stream(), Recipe(epochs=2, lr=0.05)).train(lambda: None)
    return network.state_dict()


def test_two_processes_train_the_teacher_of_one(pair: Pair) -> None:
    alone = _train_teacher()
    for found in pair(_train_teacher):
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)


def _refused(name: str) -> str:
    try:
        make_agent(name, make_env())
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_a_method_that_needs_the_whole_batch_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AGENTS, "mmkd", {})
    assert _refused("mmkd") == "accepted"
    assert all("mmkd: runs in a single process only" in text for text in pair(_refuse_mmkd))


def _refuse_mmkd() -> str:
    AGENTS["mmkd"] = {}
    return _refused("mmkd")


def _evaluate_in_a_callback() -> str:
    agent = make_agent("ppo", make_env())
    assert isinstance(agent, SB3Agent)
    try:
        StudentEvaluation().init_callback(agent.model)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_a_callback_that_would_evaluate_alone_is_refused(pair: Pair) -> None:
    messages = pair(_evaluate_in_a_callback)
    assert all("runs in a single process only" in message for message in messages)
