import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.config import parse_arguments
from mtkd_env import registration
from mtkd_env.errors import ConfigError
from mtkd_env.precision import PRECISIONS, autocast
from mtkd_env.teachers import TeacherEnsemble, forms
from mtkd_env.teachers.forms import Fitted, fastest_forms
from mtkd_env.types import NetworkOutput
from tiny import TEACHERS, TinyNetwork, batch, teacher_networks

NAMES = tuple(TEACHERS)
INPUTS = batch().inputs


def outputs(known: Any) -> list[Tensor]:
    return [known.logits, *known.features, *known.feature_maps]


# Layout.


def test_maps_have_their_channels_last_in_memory() -> None:
    known = TeacherEnsemble(teacher_networks(), NAMES)(INPUTS)
    for feature_map in known.feature_maps:
        assert feature_map.is_contiguous(memory_format=torch.channels_last)


def test_outputs_can_be_kept_for_a_backward_pass() -> None:
    known = TeacherEnsemble(teacher_networks(), NAMES)(INPUTS)
    for output in outputs(known):
        student = torch.ones_like(output, requires_grad=True)
        (student * output).sum().backward()
        assert student.grad is not None
        assert student.grad.equal(output)


def test_weights_in_half_precision_give_what_autocast_makes_of_whole_ones() -> None:
    networks = teacher_networks()
    whole, half = TeacherEnsemble(networks, NAMES), TeacherEnsemble(networks, NAMES, "bf16")
    device = INPUTS.device
    with torch.no_grad(), autocast("bf16", device):
        expected = [network(INPUTS) for network in whole.networks]
    found = half(INPUTS)
    for m, output in enumerate(expected):
        assert found.logits[m].equal(output.logits.float())
        assert found.feature_maps[m].equal(output.feature_map)
    layers = [one for one in half.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}


class Standardised(nn.Conv2d):
    """A layer that may do with its weights what half precision is too coarse for."""


def test_layers_of_other_classes_keep_whole_weights() -> None:
    network = TinyNetwork()
    network.body[0] = Standardised(1, 6, 3, 2, padding=1)
    network.body[1] = nn.Identity()
    teacher = TeacherEnsemble([network.eval()], ["a"], "bf16").networks[0]
    assert teacher.get_parameter("body.0.weight").dtype == torch.float32
    assert teacher.get_parameter("body.3.weight").dtype == torch.bfloat16


# The search. Forms and their seconds are given, so that it is known what should come out.


class Search:
    """Searches with given forms, counting how often each was made."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        self.made: list[str] = []
        self.notes: list[str] = []
        self.measured = 0
        self._patch = monkeypatch
        monkeypatch.setattr(forms, "_seconds", self._seconds)

    def _seconds(self, asks: Mapping[str, Any], _inputs: Tensor) -> dict[str, list[float]]:
        self.measured += 1
        return {form: [self._speeds[form]] * 3 for form in asks}

    def __call__(
        self,
        seconds: dict[str, float],
        changes: dict[str, Callable[[NetworkOutput], NetworkOutput]] | None = None,
        *,
        network: nn.Module | None = None,
        inputs: Tensor = INPUTS,
        precision: str = "fp32",
    ) -> dict[str, Fitted]:
        """Searches among forms that take such times, of which some change the outputs."""
        self._speeds = {"eager": 1.0, **seconds}

        def maker(form: str) -> Callable[[nn.Module, Tensor], Any]:
            change = (changes or {}).get(form, lambda output: output)

            def make(network: nn.Module, _inputs: Tensor) -> Any:
                self.made.append(form)
                return lambda inputs: change(network(inputs))

            return make

        self._patch.setattr(forms, "FORMS", {"cpu": {form: maker(form) for form in seconds}})
        return fastest_forms(
            {"a": network or teacher_networks(1)[0]},
            inputs,
            precision=precision,
            cache=self.cache,
            note=self.notes.append,
        )


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    return Search(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"one": 0.5, "two": 0.25}, "two"),
        ({"one": 0.5, "two": 2.0}, "one"),
        ({"one": 1 / 1.04, "two": 2.0}, "one"),
        ({"one": 1 / 1.02, "two": 2.0}, None),
        ({"one": 2.0}, None),
        ({}, None),
    ],
)
def test_the_fastest_form_is_taken_if_it_is_faster_than_eager(
    search: Search, seconds: dict[str, float], expected: str | None
) -> None:
    fitted = search(seconds)
    assert {name: one.form for name, one in fitted.items()} == ({"a": expected} if expected else {})
    (note,) = search.notes
    assert note.startswith(f"teacher a: {expected or 'eager'}; against eager: ")
    assert all(f"{form} {1 / time:.2f}x (built in " in note for form, time in seconds.items())


def test_a_form_with_other_outputs_does_not_count(search: Search) -> None:
    def off(output: NetworkOutput) -> NetworkOutput:
        return replace(output, feature_map=output.feature_map * 1.001)

    def rounded(output: NetworkOutput) -> NetworkOutput:
        return replace(output, feature_map=output.feature_map * 1.00001)

    def broken(output: NetworkOutput) -> NetworkOutput:
        return replace(output, logits=output.logits * torch.nan)

    seconds = {"off": 0.1, "rounded": 0.5, "broken": 0.1}
    fitted = search(seconds, {"off": off, "rounded": rounded, "broken": broken})
    assert fitted["a"].form == "rounded"
    assert search.notes[0].startswith("teacher a: no form 'off': its outputs differ by 1.0e-03")
    assert search.notes[1].startswith("teacher a: no form 'broken': its outputs differ by nan")


def test_a_form_that_cannot_be_built_is_left_out_with_a_line(search: Search) -> None:
    def fail(_output: NetworkOutput) -> NetworkOutput:
        raise RuntimeError("no compiler\nof any kind")

    assert search({"one": 0.1, "two": 0.5}, {"one": fail})["a"].form == "two"
    assert search.notes[0] == "teacher a: no form 'one': no compiler"


def test_the_second_search_measures_nothing_and_builds_what_was_chosen(search: Search) -> None:
    seconds = {"one": 0.5, "two": 0.25}
    first = search(seconds)
    search.made.clear()
    second = search(seconds)
    assert first["a"].form == second["a"].form == "two"
    assert search.made == ["two"]
    assert search.measured == 1
    assert search.notes[1].startswith("teacher a: two; as measured before (built in ")


def test_a_remembered_form_that_cannot_be_built_any_more_is_left_out(search: Search) -> None:
    def fail(_output: NetworkOutput) -> NetworkOutput:
        raise RuntimeError("gone")

    search({"one": 0.5})
    assert search({"one": 0.5}, {"one": fail}) == {}
    assert search.notes[1:] == [
        "teacher a: no form 'one': gone",
        "teacher a: eager; as measured before",
    ]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"form": "unheard-of"}', '{"form": []}'])
def test_what_cannot_be_read_is_measured_anew(search: Search, content: str) -> None:
    search({"one": 0.5})
    (path,) = (search.cache / "forms").iterdir()
    path.write_text(content, encoding="utf-8")
    assert search({"one": 0.5})["a"].form == "one"
    assert search.measured == 2
    assert json.loads(path.read_text(encoding="utf-8"))["form"] == "one"


OTHERS: dict[str, dict[str, Any]] = {
    "network": {"network": teacher_networks()[1]},
    "batch size": {"inputs": INPUTS[:3]},
    "image size": {"inputs": torch.cat([INPUTS, INPUTS], dim=2)},
    "precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_choice_holds_for_nothing_else(search: Search, change: str) -> None:
    search({"one": 0.5})
    search({"one": 0.5}, **OTHERS[change])
    assert search.measured == 2


def test_a_choice_holds_for_other_weights(search: Search) -> None:
    network = teacher_networks(1)[0]
    search({"one": 0.5}, network=network)
    with torch.no_grad():
        network.classifier.weight.mul_(2)
    search({"one": 0.5}, network=network)
    assert search.measured == 1


def test_a_choice_holds_for_one_number_of_threads(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    search({"one": 0.5})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    search({"one": 0.5})
    assert search.measured == 2


def test_times_are_taken_in_turns_after_a_call_that_does_not_count() -> None:
    called: list[str] = []

    def ask(form: str) -> Any:
        return lambda _inputs: called.append(form)

    seconds = forms._seconds({"eager": ask("eager"), "one": ask("one")}, INPUTS)
    rounds = len(seconds["eager"])
    assert forms.FEWEST_ROUNDS <= rounds == len(seconds["one"]) <= forms.MOST_ROUNDS
    assert called == ["eager", "one"] * (1 + rounds)
    assert all(second >= 0 for second in seconds["one"])


# The ensemble in other forms.


def test_images_of_another_shape_are_asked_about_as_before() -> None:
    network = teacher_networks(1)[0]
    asked: list[str] = []

    def ask(form: str) -> Any:
        def asked_of(inputs: Tensor) -> NetworkOutput:
            asked.append(form)
            assert form == "eager" or inputs.is_contiguous()
            return network(inputs)

        return asked_of

    fitted = Fitted("one", ask("eager"), ask("one"), INPUTS.shape)
    for inputs in (INPUTS, INPUTS[:2], INPUTS.transpose(2, 3), INPUTS[:, :, :6]):
        fitted(inputs)
    assert asked == ["one", "eager", "one", "eager"]


@pytest.mark.parametrize("form", [{}, {"channels_first": forms._channels_first}])
def test_the_outputs_are_the_same_in_every_form(
    form: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "FORMS", {"cpu": form})
    monkeypatch.setattr(forms, "WORTHWHILE", 0.0)
    networks = [network.double() for network in teacher_networks()]
    ensemble = TeacherEnsemble(networks, NAMES)
    inputs = INPUTS.double()
    before = ensemble(inputs)
    keys = list(ensemble.state_dict())
    ensemble.fit(inputs, cache=tmp_path, note=lambda _line: None)
    assert [one.form for one in ensemble._fitted.values()] == list(form) * 3
    for found, expected in zip(outputs(ensemble(inputs)), outputs(before), strict=True):
        torch.testing.assert_close(found, expected)
    assert list(ensemble.state_dict()) == keys
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.filterwarnings("default")
def test_the_compiled_form_has_the_same_outputs() -> None:
    network = TeacherEnsemble(teacher_networks(1), NAMES[:1]).networks[0]
    with torch.no_grad():
        expected, found = network(INPUTS), forms._compiled(network, INPUTS)(INPUTS)
    assert forms._difference(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.filterwarnings("default")
def test_without_a_compiler_there_is_no_compiled_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    ensemble, notes = TeacherEnsemble(teacher_networks(1), NAMES[:1]), []
    ensemble.fit(INPUTS[:2], cache=tmp_path, note=notes.append)
    assert any("no form 'compiled'" in note for note in notes)
    assert notes[-1].startswith("teacher narrow: ")
    assert ensemble(INPUTS[:2]).logits.isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", forms.FORMS["cuda"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_forms_on_a_gpu_keep_their_outputs_when_they_are_asked_again(
    form: str, precision: str
) -> None:
    ensemble = TeacherEnsemble(teacher_networks(), NAMES, precision).to("cuda")
    images = [INPUTS.to("cuda"), batch(seed=1).inputs.to("cuda")]
    with torch.no_grad(), autocast(precision, images[0].device):
        for network in ensemble.networks:
            ask = forms.FORMS["cuda"][form](network, images[0])
            found = [ask(inputs) for inputs in images]
            for output, inputs in zip(found, images, strict=True):
                tolerance = forms.TOLERANCES["fp16" if precision == "fp32" else precision]
                assert forms._difference(output, network(inputs)) < tolerance


# Arguments.


def test_auto_fits_the_teachers_to_the_runs_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "FORMS", {"cpu": {"channels_first": forms._channels_first}})
    monkeypatch.setattr(forms, "WORTHWHILE", 0.0)
    notes: list[str] = []
    assembly = registration.assemble(
        teachers=[{"network": "resnet8", "width": 0.25, "kind": "random"}],
        num_envs=16,
        compile="auto",
        cache=tmp_path,
        note=notes.append,
    )
    (fitted,) = assembly.pool.ensemble._fitted.values()
    assert fitted.shape == (16, 1, 8, 8)
    assert next(assembly.env.stream).inputs.is_contiguous()
    assert len(notes) == 1


def test_another_word_for_compile_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown compile 'aut'; did you mean 'auto'"):
        registration.assemble(compile="aut")
    with pytest.raises(ConfigError, match="unknown compile 'aut'; did you mean 'auto'"):
        parse_arguments(["--compile", "aut"])


def test_the_form_is_no_part_of_what_a_runs_numbers_depend_on() -> None:
    (plain,), (fitted,) = parse_arguments([]), parse_arguments(["--compile", "auto"])
    assert fitted.compile == "auto"
    assert plain.digest == fitted.digest
