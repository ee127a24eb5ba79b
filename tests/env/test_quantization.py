from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.config import parse_arguments
from mtkd_env import registration
from mtkd_env.computing import Computing
from mtkd_env.data import DataSpec
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import evaluate
from mtkd_env.networks import NETWORKS, Network, build_network
from mtkd_env.optimization import Recipe
from mtkd_env.precision import INT8
from mtkd_env.registration import load_images
from mtkd_env.teachers import TeacherEnsemble, quantization
from mtkd_env.teachers.preparation import Progress
from mtkd_env.teachers.quantization import check_teacher_precision, quantize
from mtkd_env.teachers.training import TeacherTraining, TrainingSet
from mtkd_env.types import Batch, NetworkOutput
from tiny import TinyNetwork, Told, batch, snapshot, teacher_networks

# Torch follows a network with stand-ins for its tensors, which are no shapes.
pytestmark = pytest.mark.usefixtures("_unchecked_shapes")


@cache
def digits() -> TrainingSet:
    return load_images(DataSpec())


@cache
def trained(name: str) -> Network:
    """A small teacher of the digits after a few epochs."""
    module = build_network(name, num_classes=10, in_channels=1, width=0.25, seed=0)
    stream = digits().stream(64, torch.device("cpu"), 0)
    TeacherTraining(module, stream, Recipe(epochs=4, lr=0.1)).train(lambda: None)
    return module


def calibration() -> list[Batch]:
    few = digits().data.split(train_size=128).train
    return list(digits().data.evaluation_batches(few, 64, device="cpu"))


def unseen() -> Iterator[Batch]:
    return digits().evaluation_batches(digits().splits.test, "cpu")


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_int8_teachers_of_the_digits_agree_with_what_they_were(name: str) -> None:
    network, notes = trained(name), []
    ensemble = TeacherEnsemble([network], [name])
    fidelity = quantization.quantize_teachers(ensemble, calibration(), unseen(), note=notes.append)[
        name
    ]
    assert fidelity.agreement > 0.95
    assert fidelity.logit_error < 0.06
    before = evaluate(network, unseen())
    assert before.accuracy > 0.7
    assert abs(fidelity.evaluation.accuracy - before.accuracy) < 0.03
    assert abs(fidelity.evaluation.cross_entropy - before.cross_entropy) < 0.05
    (note,) = notes
    assert note.startswith(f"teacher {name}: int8; on the test images the same class as fp32 for ")
    assert f"{fidelity.agreement:.2%}" in note
    assert f"{fidelity.logit_error:.4f}" in note


def test_a_fidelity_is_that_of_a_loop() -> None:
    ensemble = TeacherEnsemble([trained("resnet8")], ["a"])
    before = ensemble.networks[0]
    fidelity = quantization.quantize_teachers(
        ensemble, calibration(), unseen(), note=lambda _: None
    )["a"]
    batches = list(unseen())
    with torch.no_grad():
        old = torch.cat([before(one.inputs).logits for one in batches])
        new = torch.cat([ensemble(one.inputs).logits[0] for one in batches])
    targets = torch.cat([one.targets for one in batches])
    agreement = (old.argmax(1) == new.argmax(1)).double().mean()
    error = (new - old).double().abs().mean() / old.double().std(correction=0)
    entropy = torch.nn.functional.cross_entropy(new.double(), targets)
    assert fidelity.agreement == pytest.approx(float(agreement))
    assert fidelity.logit_error == pytest.approx(float(error))
    assert fidelity.evaluation.cross_entropy == pytest.approx(float(entropy))
    assert fidelity.evaluation.accuracy == (new.argmax(1) == targets).double().mean()


def quantized_ensemble(networks: list[Any]) -> tuple[TeacherEnsemble, list[str]]:
    names, notes = [f"t{m}" for m in range(len(networks))], []
    ensemble = TeacherEnsemble(networks, names)
    few = [batch(1, 32), batch(2, 32)]
    quantization.quantize_teachers(ensemble, few, few, note=notes.append)
    return ensemble, notes


def test_outputs_are_float32_without_gradient_and_of_the_same_shapes() -> None:
    networks = teacher_networks()
    expected = TeacherEnsemble(networks, ["a", "b", "c"])(batch().inputs)
    ensemble, _ = quantized_ensemble(networks)
    known = ensemble(batch().inputs)
    assert ensemble.precision == INT8
    for found, wanted in (
        (known.logits, expected.logits),
        *zip(known.features, expected.features, strict=True),
        *zip(known.feature_maps, expected.feature_maps, strict=True),
    ):
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        assert not found.requires_grad
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_classifiers_stay_what_they_are() -> None:
    networks = teacher_networks()
    before = TeacherEnsemble(networks, ["a", "b", "c"])
    ensemble, _ = quantized_ensemble(networks)
    known = ensemble(batch().inputs)
    assert ensemble.classify(known.feature_maps).equal(before.classify(known.feature_maps))
    # The last map alone is rounded, and what follows it is not.
    torch.testing.assert_close(ensemble.classify(known.feature_maps), known.logits)


def test_quantising_leaves_the_network_as_it_was() -> None:
    network = teacher_networks(1)[0]
    tensors = snapshot(network)
    attributes = {name: set(vars(layer)) for name, layer in network.named_modules()}
    quantize(network, [batch(1, 32).inputs])
    assert all(tensor.equal(tensors[name]) for name, tensor in network.state_dict().items())
    assert {name: set(vars(layer)) for name, layer in network.named_modules()} == attributes


def test_the_same_images_give_the_same_network() -> None:
    (first, _), (second, _) = (quantized_ensemble(teacher_networks()) for _ in range(2))
    assert first(batch().inputs).logits.equal(second(batch().inputs).logits)


class Deciding(TinyNetwork):
    """Its forward depends on its input, which torch.fx cannot follow."""

    def features(self, inputs: Tensor) -> Tensor:
        return super().features(inputs if inputs.sum() > 0 else -inputs)


def test_a_network_that_cannot_be_followed_stays_in_float32_with_a_line() -> None:
    networks = [Deciding().eval(), teacher_networks(1)[0]]
    expected = TeacherEnsemble(networks, ["a", "b"])(batch().inputs)
    ensemble, notes = quantized_ensemble(networks)
    known = ensemble(batch().inputs)
    assert known.logits[0].equal(expected.logits[0])
    assert not known.logits[1].equal(expected.logits[1])
    assert notes[0].startswith("teacher t0: fp32; cannot be int8: ")
    assert notes[1].startswith("teacher t1: int8; ")
    assert ensemble.precision == INT8


# The first network of every family.
FAMILIES = {getattr(maker, "func", maker): name for name, maker in reversed(NETWORKS.items())}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values())
def test_every_family_can_be_quantised(name: str) -> None:
    module = build_network(name, num_classes=3, in_channels=1, width=0.25, seed=0)
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(50):  # Until the batch norms know the activations.
            module(images)
    module.eval()
    output = quantize(TeacherEnsemble([module], ["a"]).networks[0], [images])(images)
    with torch.no_grad():
        expected = module(images)
    assert isinstance(output, NetworkOutput)
    # Untrained networks amplify what is rounded, all the more at a single pixel. Of what tells the
    # images apart: all features of an untrained network are alike.
    ours, theirs = (found.feature - found.feature.mean(0) for found in (output, expected))
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.4


# Arguments.


def assemble(
    cache_folder: Path, precision: str | None = None, progress: Progress | None = None
) -> registration.Assembly:
    return registration.assemble(
        teachers=[{"network": "resnet8", "width": 0.25, "kind": "random"}],
        data={"batch_size": 16},
        computing={"cache": cache_folder, "teacher_precision": precision},
        progress=progress,
    )


def test_an_environment_has_int8_teachers_and_says_how_near_they_are(tmp_path: Path) -> None:
    progress = Told()
    full = assemble(tmp_path)
    assembly = assemble(tmp_path, "int8", progress)
    assert full.fidelities == {}
    assert assembly.pool.ensemble.precision == "int8"
    assert assembly.env.distiller.precision == "fp32"
    (fidelity,) = assembly.fidelities.values()
    assert assembly.pool.evaluations == {"resnet8-random": fidelity.evaluation}
    assert assembly.pool.digests == full.pool.digests
    assert len(progress.notes) == 1
    assembly.env.reset(seed=0)
    _, reward, *_ = assembly.env.step(assembly.env.action_space.sample())
    assert torch.as_tensor(reward).isfinite().all()


def test_teachers_can_have_a_precision_of_their_own(tmp_path: Path) -> None:
    assembly = assemble(tmp_path, "bf16")
    assert assembly.pool.ensemble.precision == "bf16"
    assert assembly.env.distiller.precision == "fp32"


def test_int8_is_for_cpus_only() -> None:
    with pytest.raises(ConfigError, match="teacher_precision: int8 is for the device cpu, got cud"):
        check_teacher_precision("int8", "cuda:1")


def test_an_unknown_precision_is_named() -> None:
    message = "unknown teacher_precision 'int9'; did you mean 'int8'"
    with pytest.raises(ConfigError, match=message):
        Computing(teacher_precision="int9")
    with pytest.raises(ConfigError, match=message):
        parse_arguments(["--teacher_precision", "int9"])


def test_a_torch_without_quantisation_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(quantization.importlib, "import_module", gone)
    with pytest.raises(ConfigError, match=r"needs torch\.ao\.quantization, which torch .* does"):
        check_teacher_precision("int8", "cpu")


@pytest.mark.parametrize("vnni", [True, False])
def test_activations_have_the_bits_that_the_processor_can_sum(
    vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(type(torch.backends.quantized), "engine", "x86")
    assert quantization._backend() == ("onednn" if vnni else "x86")
    monkeypatch.setattr(type(torch.backends.quantized), "engine", "qnnpack")
    assert quantization._backend() == "qnnpack"


def test_a_torch_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(torch.backends.quantized), "engine", "none")
    with pytest.raises(ConfigError, match="this build of torch has no kernels for int8"):
        check_teacher_precision("int8", "cpu")
