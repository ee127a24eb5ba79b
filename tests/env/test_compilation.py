"""Compiled networks compute what they did before; without a compiler that is told at once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments.config import parse_arguments
from mtkd_env import compilation
from mtkd_env.compilation import MODES, NONE, check_compile, compiled
from mtkd_env.distiller import StudentView
from mtkd_env.errors import ConfigError
from mtkd_env.registration import assemble
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.types import NetworkOutput, TeacherWeights
from tiny import TEACHERS, TinyNetwork, batch, make_tiny_distiller, snapshot, teacher_networks

INPUTS = batch().inputs
COMPILED = [mode for mode in MODES if mode != NONE]


class Counter:
    """Stands in for `torch.compile`: the same network, in calls that are counted."""

    def __init__(self) -> None:
        self.modes: list[str] = []
        self.calls: list[int] = []

    def __call__(self, network: nn.Module, *, dynamic: bool, mode: str) -> nn.Module:
        assert not dynamic
        self.modes.append(mode)
        wrapped = nn.Sequential(network)
        wrapped.register_forward_hook(lambda *_: self.calls.append(len(_[1][0])))
        return wrapped


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    monkeypatch.setattr(torch, "compile", found := Counter())
    return found


def trained(mode: str) -> dict[str, Tensor]:
    distiller = make_tiny_distiller(compile=mode)
    for seed in range(3):
        state = distiller.forward(batch(seed))
        distiller.update(state, TeacherWeights.uniform(state.divergence))
        distiller.revisit(state)
    return snapshot(distiller.module)


def test_nothing_is_compiled_by_default(counter: Counter) -> None:
    network = TinyNetwork()
    assert compiled(network, NONE) is network
    trained(NONE)
    assert not counter.modes


@pytest.mark.parametrize("mode", COMPILED)
def test_only_the_steps_of_the_student_are_compiled(mode: str, counter: Counter) -> None:
    expected = trained(NONE)
    found = trained(mode)
    assert set(counter.modes) == {mode}
    assert counter.calls == [len(INPUTS)] * 3
    assert all(found[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("mode", COMPILED)
def test_teachers_are_compiled_for_one_number_of_images(mode: str, counter: Counter) -> None:
    ensemble = TeacherEnsemble(teacher_networks(), list(TEACHERS))
    before, keys = ensemble(INPUTS), list(ensemble.state_dict())
    ensemble.substitute({ensemble.names[0]: ensemble.networks[0]}, "int8")
    ensemble.compile_for(len(INPUTS), mode)
    ensemble(INPUTS[:2])
    assert ensemble(INPUTS).logits.equal(before.logits)
    assert counter.calls == [len(INPUTS)] * (len(TEACHERS) - 1)
    assert list(ensemble.state_dict()) == keys


class Fixed(nn.Module):
    def __init__(self, output: StudentView) -> None:
        super().__init__()
        self._output = output

    def forward(self, inputs: Tensor) -> StudentView:
        del inputs
        return self._output


def test_what_graphs_overwrite_is_copied() -> None:
    parts = torch.rand(3, 2, 2, requires_grad=True).unbind()
    output = NetworkOutput(parts[0], parts[1], parts[2].view(2, 2, 1, 1))
    view = StudentView(output, (parts[0],), ())
    found = compilation._Copying(Fixed(view))(INPUTS)
    assert isinstance(found, StudentView)
    assert found.projected[0].equal(parts[0])
    assert found.embedded == ()
    assert found.output.logits.equal(parts[0])
    assert found.output.logits.data_ptr() != parts[0].data_ptr()
    assert found.output.feature_map.requires_grad


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.filterwarnings("default")
def test_a_compiled_student_learns_the_same() -> None:
    check_compile("default", "cpu")
    expected, found = trained(NONE), trained("default")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.filterwarnings("default")
def test_compiled_teachers_say_the_same() -> None:
    ensemble = TeacherEnsemble(teacher_networks(), list(TEACHERS))
    expected = ensemble(INPUTS)
    ensemble.compile_for(len(INPUTS), "default")
    torch.testing.assert_close(ensemble(INPUTS).logits, expected.logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_missing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="compile: expected none, torch cannot compile for 'cpu'"):
        check_compile("default", "cpu")


def test_another_word_for_compile_is_named() -> None:
    for call in (
        lambda: assemble(computing={"compile": "max-autotun"}),
        lambda: parse_arguments(["--compile=max-autotun"]),
    ):
        with pytest.raises(
            ConfigError, match="unknown compile 'max-autotun'; did you mean 'max-autotune'"
        ):
            call()
