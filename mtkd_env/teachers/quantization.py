"""Teachers in 8-bit integers on a CPU: several times as fast, and nearly the same.

Static quantisation after training: scales of activations come from a pass over training images.
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import Evaluation, evaluation_of
from mtkd_env.losses import cross_entropy
from mtkd_env.precision import FULL, INT8, check_precision
from mtkd_env.teachers.ensemble import TeacherEnsemble, own_targets
from mtkd_env.types import UNKNOWN, Batch

# Called with a line about how the teachers are computed.
Note = Callable[[str], None]

# What torch says of its own future on every use, by the beginnings of its warnings.
OUTLOOKS = (
    "torch.ao.quantization is deprecated",
    "Please use quant_min and quant_max",
    "torch.quantize_per_tensor",
)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near an int8 teacher is to the float32 one, on the test images.

    Attributes:
        agreement: Share of the images to which both give the same class.
        logit_error: Mean absolute difference of the logits, relative to the standard deviation of
            the float32 ones.
        evaluation: The int8 teacher's own result.
    """

    agreement: float
    logit_error: float
    evaluation: Evaluation


def check_teacher_precision(precision: str, device: torch.device | str) -> None:
    """Checks what teachers are to compute in.

    Raises:
        ConfigError: A precision that the device, or this torch, does not have.
    """
    if precision != INT8:
        check_precision(precision, device)
        return
    kind = torch.device(device).type
    if kind != "cpu":
        raise ConfigError(f"teacher_precision: {INT8} is for the device cpu, got {kind}")
    _torch_quantization()


def quantize_teachers(
    ensemble: TeacherEnsemble,
    calibration: Iterable[Batch],
    test: Iterable[Batch],
    *,
    note: Note,
) -> dict[str, Fidelity]:
    """Lets int8 networks stand in for teachers.

    Networks that torch cannot quantise stay what they are; so do what follows the last feature
    map, and `classify`.

    Args:
        ensemble: Teachers in float32 on the CPU.
        calibration: Training images, without augmentation; the same in every process.
        test: Test images; of several processes, each gives its share.
        note: Told of every teacher how near the int8 one is.

    Returns:
        How near each int8 teacher is to what it was, by name.
    """
    images = [ensemble.images(batch.inputs) for batch in calibration]
    quantized: dict[str, nn.Module] = {}
    for m, (name, network) in enumerate(zip(ensemble.names, ensemble.networks, strict=True)):
        try:
            quantized[name] = quantize(network, [of_teachers[m] for of_teachers in images])
        # What it was not made for fails in many ways, and can be asked in float32 all the same.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            note(f"teacher {name}: {FULL}; cannot be {INT8}: {reason}")
    fidelities = _compare(ensemble, quantized, test)
    ensemble.substitute(quantized, INT8)
    for name, found in fidelities.items():
        note(
            f"teacher {name}: {INT8}; on the test images the same class as {FULL} for "
            f"{found.agreement:.2%}, logits off by {found.logit_error:.4f} of their standard "
            f"deviation, accuracy {found.evaluation.accuracy:.2%}"
        )
    return fidelities


@torch.no_grad()
def quantize(network: nn.Module, images: Sequence[Float[Tensor, "B K H W"]]) -> nn.Module:
    """An int8 copy of a network in evaluation mode, whose outputs are float32.

    Args:
        network: The network; not changed.
        images: Batches that the scales of its activations are taken from.

    Raises:
        Exception: Torch cannot quantise it.
    """
    preparation, conversion = _torch_quantization()
    mapping = preparation.get_default_qconfig_mapping(_backend())
    # Pooling and classifier cost nothing, and to round the feature would cost accuracy.
    mapping.set_object_type("mean", None)
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    for name in linear[-1:]:
        mapping.set_module_name(name, None)
    # ShuffleNetV1's brings its inputs to one scale first. What that costs, `Fidelity` says; torch
    # would warn in every call.
    warnings.filterwarnings("ignore", "All inputs of this cat operator must share")
    with warnings.catch_warnings():
        for beginning in OUTLOOKS:
            warnings.filterwarnings("ignore", beginning)
        observed = conversion.prepare_fx(copy.deepcopy(network), mapping, (images[0],))
        for inputs in images:
            observed(inputs)
        quantized: nn.Module = conversion.convert_fx(observed)
        quantized(images[0])
    return quantized


def _backend() -> str:
    """Whose settings suit this processor.

    Sums of products of 8 bits overflow on x86 without VNNI, so that torch's own leave activations 7
    of them; oneDNN's leave all 8, with two thirds of the error.
    """
    engine: str = torch.backends.quantized.engine
    return "onednn" if engine == "x86" and torch.cpu._is_vnni_supported() else engine


def _torch_quantization() -> tuple[Any, Any]:
    """Torch's modules of static quantisation: its settings, and what applies them to a graph.

    Torch means to drop them for another package's, which needs a C++ compiler and minutes where
    this needs seconds.
    """
    try:
        settings = importlib.import_module("torch.ao.quantization")
        conversion = importlib.import_module("torch.ao.quantization.quantize_fx")
    except ImportError as error:
        raise ConfigError(
            f"teacher_precision: {INT8} needs torch.ao.quantization, which torch "
            f"{torch.__version__} does not have; install torch<=2.15"
        ) from error
    if torch.backends.quantized.engine == "none":
        raise ConfigError(f"teacher_precision: this build of torch has no kernels for {INT8}")
    return settings, conversion


@torch.no_grad()
def _compare(
    ensemble: TeacherEnsemble, quantized: Mapping[str, nn.Module], test: Iterable[Batch]
) -> dict[str, Fidelity]:
    """How near networks are to the teachers that they are to stand in for."""
    teachers = dict(zip(ensemble.names, ensemble.networks, strict=True))
    sums = {name: torch.zeros(9, dtype=torch.float64) for name in quantized}
    for batch in test:
        images = dict(zip(ensemble.names, ensemble.images(batch.inputs), strict=True))
        for name, network in quantized.items():
            before, after = (one(images[name]).logits for one in (teachers[name], network))
            classes = ensemble.classes.get(name)
            targets = own_targets(batch.targets, classes, ensemble.num_classes)
            sums[name] += _sums(before.double(), after.double(), targets)
    return {name: _fidelity(distributed.total(found)) for name, found in sums.items()}


def _sums(
    before: Float[Tensor, "B C"], after: Float[Tensor, "B C"], targets: Tensor
) -> Float[Tensor, " N"]:
    """What `_fidelity` needs of a batch, in sums over its samples."""
    guesses = after.argmax(1)
    return torch.stack(
        [
            torch.tensor(len(before), dtype=torch.float64),
            (targets != UNKNOWN).sum(),
            torch.tensor(before.numel(), dtype=torch.float64),
            (before.argmax(1) == guesses).sum(),
            (guesses == targets).sum(),
            cross_entropy(after, targets).sum(),
            (after - before).abs().sum(),
            before.sum(),
            before.square().sum(),
        ]
    )


def _fidelity(sums: Float[Tensor, " N"]) -> Fidelity:
    samples, labelled, numbers, agreed, correct, entropy, off, total, squares = sums.tolist()
    variance = squares / numbers - (total / numbers) ** 2
    return Fidelity(
        agreement=agreed / samples,
        logit_error=off / numbers / max(variance, 1e-12) ** 0.5,
        evaluation=evaluation_of(correct, entropy, samples, labelled),
    )
