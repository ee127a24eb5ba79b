from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import kendalltau
from stable_baselines3 import PPO
from torch import Tensor, nn

from agents import AGENTS
from benchmarking import config_of, one_line_error, read, start, tiny_assembly
from experiments import benchmark
from experiments.benchmarks import Request, contestant, reward_signal
from experiments.benchmarks import agents as agents_benchmark
from experiments.benchmarks.agents import default_methods, paper_ratios
from experiments.benchmarks.contestant import Contestant, comparable_configs, make_env
from experiments.benchmarks.memory import HistoryMeter, held_bytes
from experiments.benchmarks.reward_signal import look
from experiments.benchmarks.timing import (
    DeviceStopwatch,
    HostStopwatch,
    Percentiles,
    Reading,
    Stopwatch,
    ratios,
    take_turns,
    timed,
)
from experiments.benchmarks.usefulness import (
    TERMS,
    TRUTHS,
    by_term,
    distillation_terms,
    finds_best,
    frozen,
    kendall,
    most_frequent_share,
    usefulness,
)
from experiments.config import CONFIGS, parse_arguments
from mtkd_env import Assembly
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.losses import cross_entropy
from mtkd_env.reward import REWARDS, make_reward
from mtkd_env.types import Batch, DistillState, TeacherOutputs
from mtkd_env.weighting import WEIGHTINGS
from tiny import (
    STEPS_PER_EPOCH,
    TEACHERS,
    batch,
    make_tiny_distiller,
    make_tiny_env,
)

M = len(TEACHERS)


class FakeTime(Stopwatch):
    """Clocks that stand still but for what subjects add to them."""

    clocks = ("CPU", "wall")

    def start(self) -> None:
        self.cpu = self.wall = 0.0

    def stop(self) -> Reading:
        return {"CPU": self.cpu, "wall": self.wall}

    def subject(self, costs: Iterator[float], wait: float = 0.0) -> Callable[[Stopwatch], Reading]:
        def work() -> None:
            cost = next(costs)
            self.cpu += cost
            self.wall += cost + wait

        return timed(work)


def test_ratios_are_to_the_reference_of_the_same_round() -> None:
    time = FakeTime()
    subjects = {
        "aver": time.subject(iter([1.0, 2.0, 4.0])),
        "slow": time.subject(iter([3.0, 4.0, 4.0]), wait=1.0),
    }
    readings = take_turns(subjects, time, range(3))
    assert ratios(readings, "aver", "CPU")["slow"] == [3.0, 2.0, 1.0]
    assert ratios(readings, "aver", "wall")["slow"] == [4.0, 2.5, 1.25]


def test_a_machine_that_slows_down_changes_no_ratio() -> None:
    time = FakeTime()
    pace = [1.0, 2.0, 8.0, 0.5]
    subjects = {
        "aver": time.subject(iter(pace)),
        "other": time.subject(iter(1.5 * one for one in pace)),
    }
    found = ratios(take_turns(subjects, time, range(4)), "aver", "CPU")
    assert found["other"] == [1.5] * 4


def test_the_ratio_of_the_reference_is_exactly_one() -> None:
    time = FakeTime()
    subjects = {"aver": time.subject(iter([0.1, 1 / 3, 1e-9]))}
    found = ratios(take_turns(subjects, time, range(3)), "aver", "CPU")["aver"]
    assert found == [1.0] * 3
    assert Percentiles.of(found) == Percentiles(1.0, 1.0, 1.0)


def test_subjects_take_turns() -> None:
    order: list[str] = []
    subjects = {name: timed(lambda name=name: order.append(name)) for name in "ABC"}
    take_turns(subjects, HostStopwatch(), range(3))
    assert "".join(order) == "ABCABCABC"


def test_a_spread_is_median_and_outer_tenths() -> None:
    assert Percentiles.of([float(value) for value in range(11)]) == Percentiles(5.0, 1.0, 9.0)


@pytest.mark.gpu(pretended=False)
def test_a_device_stopwatch_waits_for_the_device() -> None:
    device = torch.device("cuda")
    watch = DeviceStopwatch(device)
    matrix = torch.randn(4096, 4096, device=device)
    reading = timed(lambda: matrix @ matrix)(watch)
    assert 0 < reading["device"] <= reading["wall"]


def test_every_agent_and_three_of_its_rivals_are_measured_by_default() -> None:
    methods = default_methods()
    assert methods[:3] == ["aver", "none", "camkd"]
    assert len(set(methods)) == len(methods)
    shipped = {path.stem for path in CONFIGS.glob("algo/*.yaml")}
    official = {name for name in shipped if name.endswith("_official")}
    classical = {*WEIGHTINGS, "none", "aver_kd", "aekd_logit", "logit_mean"}
    of_specialists = {"consensus_pg", "heldout_pg", "gated_pg", "pretrained_pg"}
    assert set(methods[3:]) == {*AGENTS, *shipped} - classical - official - of_specialists


def test_methods_whose_library_is_not_installed_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = default_methods()
    monkeypatch.setattr(agents_benchmark, "find_spec", lambda _: None)
    assert set(everything) - set(default_methods()) == {"trpo", "tqc", "crossq", "ars"}


def test_the_papers_figures_are_ratios_to_equal_weights() -> None:
    assert paper_ratios("epoch") == {"aver": 1, "none": 29 / 41, "camkd": 54 / 41, "pg": 47 / 41}
    assert paper_ratios("memory")["pg"] == pytest.approx(1.14, abs=0.01)


def test_methods_share_images_and_teachers_but_no_student(assembly: Assembly) -> None:
    first, second = (make_env(assembly, config_of(algo)) for algo in ("aver", "aver_kd"))
    assert first.distiller.teachers is second.distiller.teachers is assembly.env.distiller.teachers
    assert first.stream is second.stream is assembly.env.stream
    assert first.distiller.distillation.feature_terms
    assert not second.distiller.distillation.feature_terms
    students = (env.distiller.module.parameters() for env in (first, second))
    for one, other in zip(*students, strict=True):
        assert one.data_ptr() != other.data_ptr()
        torch.testing.assert_close(one, other)


def test_methods_with_other_teachers_cannot_be_compared() -> None:
    configs = {"aver": config_of("aver"), "other": config_of("pg", "--data.batch_size", "32")}
    request: Any = SimpleNamespace(configs=lambda _: configs)
    with pytest.raises(ConfigError, match="'other' has other images or teachers than 'aver'"):
        comparable_configs(request, ["other"])


class Counts(Stopwatch):
    """Counts something between start and stop."""

    clocks = ("count",)

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._began = 0

    def start(self) -> None:
        self._began = self._count()

    def stop(self) -> Reading:
        return {"count": self._count() - self._began}


@pytest.fixture
def assembly() -> Assembly:
    return tiny_assembly()


def test_an_epoch_holds_all_steps_and_all_learning(
    assembly: Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    monkeypatch.setattr(PPO, "train", lambda self: trained.append(self.num_timesteps))
    config = config_of("ppo", "--agent.arguments", "{n_steps: 1, n_minibatches: 1}")
    ppo = Contestant(assembly, config)
    for _ in range(2):
        assert ppo(Counts(lambda: len(trained))) == {"count": STEPS_PER_EPOCH}
        assert ppo(Counts(lambda: ppo.agent.env.steps)) == {"count": STEPS_PER_EPOCH}
    assert ppo.peaks == []


def test_own_agents_learn_within_the_epoch(assembly: Assembly) -> None:
    pg = Contestant(assembly, config_of("pg"))
    learned: list[int] = []
    pg.agent.learn_from = lambda memory: learned.append(len(memory))  # type: ignore[attr-defined]
    assert pg(Counts(lambda: sum(learned))) == {"count": STEPS_PER_EPOCH}


def test_held_bytes_counts_what_is_kept_once() -> None:
    tensor, array = torch.zeros(100), np.zeros(10, dtype=np.float32)
    network = nn.Linear(4, 2, bias=False)
    holder = SimpleNamespace(
        memory=[batch(size=2), tensor, tensor[:50]],
        arrays={"whole": array, "part": array[2:]},
        network=network,
        optimizer=torch.optim.Adam(network.parameters()),
        env=make_tiny_env(),
        text="text",
    )
    holder.itself = holder
    images = batch(size=2)
    kept = images.inputs.nbytes + images.targets.nbytes + images.index.nbytes + 400 + 40
    assert held_bytes(holder, learners=False) == kept
    assert held_bytes(holder, learners=True) == kept + 4 * 2 * 4


def test_history_is_the_most_that_is_kept() -> None:
    env = make_tiny_env()
    env.reset(seed=0)
    agent = SimpleNamespace(env=env, memory=[], fixed=torch.zeros(5))
    meter = HistoryMeter(agent)  # type: ignore[arg-type]
    meter.start()
    for _ in range(2):
        for _ in range(3):
            env.distill(weights_of(env.state))
            agent.memory.append(torch.zeros(100))
        agent.memory.clear()
    assert meter.stop() == 4 * 5 + 3 * 400


def weights_of(state: DistillState) -> Any:
    return WEIGHTINGS["aver"](make_tiny_distiller())(state)


def test_the_peak_is_that_of_one_method_alone(
    assembly: Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = iter([1000, 1300, 1350])  # 300 of its own; 50 of a method that is built later
    monkeypatch.setattr(contestant, "allocated_bytes", lambda _: next(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1550)
    aver = Contestant(assembly, config_of("aver"))
    monkeypatch.setattr(aver, "_device", torch.device("cuda"))
    aver(HostStopwatch())
    assert aver.peaks == [300 + 200]


def test_a_frozen_student_computes_what_it_computes_in_training() -> None:
    module, inputs = make_tiny_distiller().module, batch(size=5).inputs
    before = {name: value.clone() for name, value in module.state_dict().items()}
    copy = frozen(module, inputs)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    ours, theirs = copy(inputs), module(inputs)
    torch.testing.assert_close(ours.output.logits, theirs.output.logits)
    torch.testing.assert_close(ours.projected, theirs.projected)


def precise_state(distiller: Distiller, images: Batch) -> DistillState:
    """A batch seen by a student and teachers in float64, which differences need."""
    state = distiller.forward(images)
    known = state.teachers
    teachers = TeacherOutputs(
        known.logits.double(),
        tuple(one.double() for one in known.features),
        tuple(one.double() for one in known.feature_maps),
    )
    distiller.module.double()
    return replace(state, batch=as_double(images), teachers=teachers)


def as_double(images: Batch) -> Batch:
    return Batch(images.inputs.double(), images.targets, images.index)


def cross_entropies(module: nn.Module, truth: str, i: int, state: DistillState) -> Tensor:
    values = cross_entropy(module(state.batch.inputs).output.logits, state.batch.targets)
    return values[i] if truth == "sample" else values.mean()


@pytest.mark.parametrize("truth", ["sample", "batch"])
@pytest.mark.parametrize(("i", "m", "term"), [(0, 0, "logit"), (3, 2, "logit"), (1, 1, "feature")])
def test_usefulness_is_what_a_small_step_of_sgd_gains(
    truth: str, i: int, m: int, term: str
) -> None:
    distiller = make_tiny_distiller()
    state = precise_state(distiller, batch())
    found = usefulness(distiller, state, as_double(batch(seed=1)))
    size = 1e-6
    module = frozen(distiller.module, state.batch.inputs)
    before = cross_entropies(module, truth, i, state)
    optimizer = torch.optim.SGD(module.parameters(), lr=size)
    terms = distillation_terms(
        module,
        dict(module.named_parameters()),
        state.batch.inputs,
        state.teachers,
        distiller.distillation.temperature,
    )
    by_term(terms)[term][i, m].backward()
    optimizer.step()
    gain = before - cross_entropies(module, truth, i, state)
    torch.testing.assert_close(by_term(found[truth])[term][i, m], gain / size, rtol=1e-3, atol=1e-8)


def test_usefulness_on_images_held_out_is_that_of_their_own_gradient() -> None:
    distiller = make_tiny_distiller()
    state = precise_state(distiller, batch())
    held_out = as_double(batch(seed=1, size=7))
    found = usefulness(distiller, state, held_out)["held-out"]
    elsewhere = frozen(distiller.module, held_out.inputs)
    loss = cross_entropy(elsewhere(held_out.inputs).output.logits, held_out.targets).mean()
    direction = torch.autograd.grad(loss, list(elsewhere.parameters()), allow_unused=True)
    module = frozen(distiller.module, state.batch.inputs)
    terms = distillation_terms(
        module,
        dict(module.named_parameters()),
        state.batch.inputs,
        state.teachers,
        distiller.distillation.temperature,
    )
    assert terms.shape == found.shape == (len(state.batch.targets), 2 * M)
    for place in ((0, 0), (2, M - 1), (3, 2 * M - 1)):
        own = torch.autograd.grad(
            terms[place], list(module.parameters()), retain_graph=True, allow_unused=True
        )
        pairs = [(a, b) for a, b in zip(own, direction, strict=True) if a is not None]
        expected = sum((a * b).sum() for a, b in pairs if b is not None)
        torch.testing.assert_close(found[place], expected)


def test_kendall_agrees_with_scipy() -> None:
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(4, (30, 5), generator=draw).float()
    second = torch.randint(4, (30, 5), generator=draw).float()
    first[0] = 1.0
    for i, value in enumerate(kendall(first, second).tolist()):
        expected = kendalltau(first[i], second[i]).statistic
        assert value == pytest.approx(0.0 if np.isnan(expected) else expected, abs=1e-6)


def test_ties_find_the_best_teacher_as_often_as_drawing_one_of_them() -> None:
    truth = torch.tensor([[1.0, 3.0, 2.0]]).expand(4, -1)
    credit = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [5.0, 5.0, 0.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(finds_best(credit, truth), torch.tensor([1.0, 0.0, 1 / 2, 1 / 3]))
    assert most_frequent_share(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])) == 2 / 3


def test_alignment_finds_the_best_teacher_more_often_than_chance() -> None:
    env = make_tiny_env()
    env.reset(seed=0)
    rewards = {(name, "before"): make_reward(name, env.distiller) for name in REWARDS}
    looks = [look(env, rewards, batch(seed=1, size=16)) for _ in range(8)]
    truth = by_term(torch.cat([known["sample"] for known, _ in looks]))["logit"]
    paid = {name: torch.cat([given[name, "before"] for _, given in looks]) for name in REWARDS}
    assert env.steps == len(looks)
    assert finds_best(paid["alignment"], truth).mean() > 1.5 / M
    assert kendall(paid["alignment"], truth).mean() > 0.3
    assert finds_best(paid["aggregate"], truth).mean() == pytest.approx(1 / M)
    assert kendall(paid["aggregate"], truth).mean() == 0


def test_agents_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agents.json"
    assert start("agents", "--methods", "pg,td3", "--rounds", "1", "--json", str(path)) == 0
    assert "history" in capsys.readouterr().out
    found = read(path)
    assert list(found["methods"]) == ["aver", "pg", "td3"]
    kept = {name: sizes["history"] for name, sizes in found["memory"].items()}
    assert kept["aver"] == 0 < kept["pg"] < kept["td3"]


@pytest.mark.slow
@pytest.mark.usefixtures("_pictures")
def test_the_reward_signal_from_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "signal.json"
    flags = ("--rounds", "2", "--epochs", "0,1", "--json", str(path))
    assert start("reward-signal", *flags) == 0
    shown = capsys.readouterr().out
    assert "configured" in shown
    assert "pay all teachers of a sample the same: aggregate, reference" in shown
    found = read(path)
    assert [point["epoch"] for point in found["points"]] == [0, 1]
    assert {point["samples"] for point in found["points"]} == {32}
    cells = len(TRUTHS) * len(TERMS) * 2 * len(REWARDS)
    assert len(found["agreements"]) == 2 * cells
    assert all(0 <= one["best"] <= 1 and -1 <= one["tau"] <= 1 for one in found["agreements"])
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_default_teachers_bring_the_broken_pools_along() -> None:
    request = SimpleNamespace(configs=lambda methods: {methods[0]: parse_arguments([])[0]})
    found = reward_signal.pools(request)  # type: ignore[arg-type]
    assert next(iter(found)) == "clean"
    assert {"permuted", "random"} <= set(found)


def test_a_log_gets_ten_lines_of_progress_or_fewer(capsys: pytest.CaptureFixture[str]) -> None:
    request = Request([], None, steps=1, rounds=1, epochs=(0,), out=Console(width=80))
    assert list(request.count(range(40), "rounds")) == list(range(40))
    assert list(request.count("ab", "pools")) == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["rounds: 4/40", "rounds: 8/40"]
    assert lines[9:] == ["rounds: 40/40", "pools: 1/2", "pools: 2/2"]


@pytest.mark.parametrize(
    ("what", "flags", "message"),
    [
        ("agent", [], "unknown --what 'agent'; did you mean 'agents'?"),
        ("step", ["--methods", "camkt"], "camkt"),
        ("step", ["--methods", "aver,,ebkd"], "--methods: expected names with commas"),
        ("step", ["--rounds", "0"], "--rounds: expected a number >= 1, got 0"),
        ("step", ["--rounds", "x"], "--rounds: expected a number >= 1, got 'x'"),
        ("step", ["--algo", "aver"], "--algo: cannot be given here; see --methods"),
        ("step", ["--json", "out.png"], "--json: expected a file that ends in .json"),
        ("step", ["--epochs", "1"], "--epochs: means nothing to --what step"),
        ("step", ["--student.netwrk", "x"], "student.network"),
        ("agents", ["--steps", "3"], "--steps: means nothing to --what agents"),
        ("agents", ["--axes", "batch"], "--axes: means nothing to --what agents"),
        ("agents", ["--variant", "a=--seed 1"], "--variant: means nothing to --what agents"),
        ("data", ["--methods", "aver"], "--methods: means nothing to --what data"),
        ("reward-signal", ["--methods", "papr"], "unknown reward 'papr'; did you mean 'paper'?"),
        ("reward-signal", ["--epochs", "0,a"], "--epochs: expected 0,1,2,..., got '0,a'"),
        ("reward-signal", ["--epochs", "3"], "--epochs: expected less than optimizer.epochs = 3"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    capsys: pytest.CaptureFixture[str],
    what: str,
    flags: list[str],
    message: str,
) -> None:
    assert start(what, "--optimizer.epochs", "3", *flags) == 2
    assert message in one_line_error(capsys)


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert start("step", "--json", str(tmp_path / "file" / "out.json")) == 2
    assert "--json: cannot make" in capsys.readouterr().err


def test_help_lists_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    shown = capsys.readouterr().out
    for name in benchmark.BENCHMARKS:
        assert f"  {name} " in shown
