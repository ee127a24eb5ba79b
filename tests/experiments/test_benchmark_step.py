"""What a step costs: the least, the machine's rates, variants, and the whole from the shell."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from agents import SB3Agent
from benchmarking import STEPS_PER_EPOCH, config_of, one_line_error, read, start, tiny_assembly
from experiments.benchmarks import floor as floor_module
from experiments.benchmarks import roofline
from experiments.benchmarks.contestant import Contestant, make_env
from experiments.benchmarks.floor import BOUNDS, MAPPED, STORED, STUDENT, floor
from experiments.benchmarks.operations import OperationWatch, counting
from experiments.benchmarks.roofline import Roofline, measured_rates
from experiments.benchmarks.timing import Reading, Stopwatch, per_unit
from experiments.benchmarks.variants import Variant, check_comparable, parse_variants
from mtkd_env.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("teachers", [True, False])
def test_the_floor_trains_a_student_without_weights_and_asks_all_teachers_or_none(
    monkeypatch: pytest.MonkeyPatch, teachers: bool
) -> None:
    assembly, config = tiny_assembly(), config_of("aver")
    asked: list[Tensor] = []
    env = make_env(assembly, config)
    monkeypatch.setattr(floor_module, "make_env", lambda *_: env)
    before = [parameter.clone() for parameter in env.distiller.student.parameters()]
    ensemble = assembly.env.distiller.teachers
    monkeypatch.setattr(ensemble, "forward", lambda inputs: asked.append(inputs))
    floor(assembly, config, steps=2, teachers=teachers)()
    assert len(asked) == (2 if teachers else 0)
    assert assembly.env.steps == env.steps == 0
    after = env.distiller.student.parameters()
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_floor_never_makes_the_host_wait() -> None:
    work = floor(tiny_assembly(), config_of("aver"), steps=2)
    with counting(CPU) as counter:
        work()
    assert counter.operations > 0
    assert counter.synchronizations == 0


def test_each_bound_of_a_step_holds_the_one_before() -> None:
    assembly, config = tiny_assembly(), config_of("aver")
    counts = {}
    for name in (STUDENT, MAPPED, STORED):
        with counting(CPU) as counter:
            BOUNDS[name](assembly, config, 1)()
        counts[name] = counter.operations
    assert counts[STUDENT] < counts[MAPPED] < counts[STORED]


def test_operations_of_an_epoch_hold_those_of_the_learning() -> None:
    assembly = tiny_assembly()
    counts = {
        algo: Contestant(assembly, config_of(algo))(OperationWatch(CPU)) for algo in ("aver", "pg")
    }
    assert counts["aver"]["operations"] < counts["pg"]["operations"]
    assert 0 < counts["aver"]["flops"] < counts["pg"]["flops"]


def test_only_an_algorithm_of_a_library_needs_two_epochs_for_one() -> None:
    assembly = tiny_assembly()
    for algo, epochs in (("aver", 1), ("pg", 1), ("ddpg", 2)):
        contestant = Contestant(assembly, config_of(algo))
        before = contestant.agent.env.steps
        contestant(OperationWatch(CPU))
        assert contestant.agent.env.steps == before + epochs * assembly.env.steps_per_epoch
        assert isinstance(contestant.agent, SB3Agent) == (epochs == 2)


def test_readings_are_shared_by_the_units_of_the_work() -> None:
    def subject(watch: Stopwatch) -> Reading:
        del watch
        return {"CPU": 6.0, "wall": 9.0}

    assert per_unit(subject, 3)(OperationWatch(CPU)) == {"CPU": 2.0, "wall": 3.0}


def test_a_roofline_is_the_arithmetic_at_the_best_rate() -> None:
    line = Roofline("floor", flops=6e9, seconds=0.1, rates={"slow": 1e10, "fast": 3e11})
    assert line.least_seconds == pytest.approx(0.02)
    assert line.share == pytest.approx(0.2)
    assert "300.0 GFLOP/s (fast; slow 10.0), so at least 20.00 ms: 20% of the 100.00 ms" in (
        line.note()
    )


def test_rates_are_the_arithmetic_over_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([1.0, *[0.5, 0.25, 0.5, 0.5, 0.5]] * len(roofline.MAKERS))
    monkeypatch.setattr(roofline, "_seconds", lambda *_: next(took))
    rates = measured_rates(CPU, "fp32")
    size, pixels = roofline.SMALLEST, roofline.IMAGES * roofline.SIDE**2
    product = 2 * size**3 / 0.25
    convolution = 2 * 9 * size**2 * pixels / 0.25
    assert list(rates.values()) == [product, convolution, convolution]


def test_variants_are_names_and_flags() -> None:
    (variant,) = parse_variants(["wide one=--student.width 0.5 --agent.arguments '{lr: 0.1}'"])
    assert variant.name == "wide one"
    assert variant.flags == ("--student.width", "0.5", "--agent.arguments", "{lr: 0.1}")
    assert variant.subject("pg") == "pg [wide one]"
    assert Variant().subject("pg") == "pg"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["wide"], "--variant: expected NAME=FLAGS with flags of mtkd run, got 'wide'"),
        (["--student.width=0.5"], "expected NAME=FLAGS"),
        (["=--seed 1"], "expected NAME=FLAGS"),
        (["a=0.5"], "expected NAME=FLAGS"),
        (["a="], "expected NAME=FLAGS"),
        (["a=--seed '1"], "No closing quotation"),
        (["a=--algo pg"], "--variant a: --algo cannot be given here; see --methods"),
        (["a=--seed 1", "a=--seed 2"], "--variant: the name 'a' is used more than once"),
    ],
)
def test_what_is_no_variant_is_told(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_variants(texts)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--data.batch_size", "8", "data.batch_size cannot differ .* expected 16, got 8"),
        ("--threads", "2", "threads cannot differ"),
        ("--data.train_size", "64", "data.train_size cannot differ"),
    ],
)
def test_a_variant_has_the_same_images_and_threads(flag: str, value: str, message: str) -> None:
    variant = Variant("other", (flag, value))
    with pytest.raises(ConfigError, match=f"--variant other: {message}"):
        check_comparable(variant, config_of("aver", *variant.flags), config_of("aver"))
    check_comparable(variant, config_of("aver", "--student.width", "0.5"), config_of("aver"))


@pytest.mark.slow
def test_steps_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    wide = "wide=--student.width 0.5"
    flags = ("--methods", "pg,floor", "--rounds", "2", "--variant", wide, "--json", str(path))
    assert start("step", *flags) == 0
    shown = capsys.readouterr().out
    for text in ("floor [wide]", "roofline: ", "waits: ", f"2 rounds of {STEPS_PER_EPOCH} steps"):
        assert text in shown
    found = read(path)
    names = [*BOUNDS, "aver", "pg"]
    assert list(found["methods"]) == [*names, *(f"{name} [wide]" for name in names)]
    assert found["methods"]["aver"]["CPU"]["ratio"]["median"] == 1
    assert found["floor_ratios"]["floor"] == {"median": 1, "low": 1, "high": 1}
    counts = found["counts"]
    assert set(counts) == set(found["methods"])
    assert counts["student"]["operations"] < counts["floor"]["operations"]
    assert counts["floor"]["operations"] < counts["aver"]["operations"]
    assert counts["floor"]["flops"] < counts["floor [wide]"]["flops"]
    assert found["setups"]["wide"]["flags"] == ["--student.width", "0.5"]
    for line in found["roofline"].values():
        assert 0 < line["share"] < 1
        assert line["least_seconds"] == line["flops"] / max(line["rates"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant", "a"], "--variant: expected NAME=FLAGS"),
        (["--variant", "a=--student.netwrk x"], "student.netwrk"),
        (["--variant", "a=--data.batch_size 8"], "--variant a: data.batch_size cannot differ"),
        (["--methods", "pgg"], "pgg"),
        (["--steps", "3"], "--steps: means nothing to --what step"),
    ],
)
def test_wrong_flags_of_a_step_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert start("step", *flags) == 2
    assert message in one_line_error(capsys)
