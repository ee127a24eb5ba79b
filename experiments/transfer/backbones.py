"""A student's backbone: all of its tensors but the classifier's, in files and in other networks."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mtkd_env.errors import ConfigError, check_same_tensors, errors_of
from mtkd_env.files import (
    file_digest,
    load_checkpoint,
    refuse_links,
    save_checkpoint,
    save_tensors,
    write_text,
)
from mtkd_env.imports import Trust
from mtkd_env.networks import Network
from mtkd_env.student import StudentDescription, describe_student, plain_tensors

TORCH, SAFETENSORS, ABOUT = "backbone.pt", "backbone.safetensors", "backbone.json"

# Networks whose tensors have the same names in torchvision, timm and segmentation-models-pytorch.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# Those that detectors and segmenters can stand on.
BACKBONES = RESNETS[:3]

# Two numbers of classes; tensors whose shapes differ between them are the classifier's.
CLASSES = (2, 3)

# Counters of batch norms, which nothing that normalises by its running statistics reads.
COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Exported:
    """What an export came to, and what `backbone.json` says.

    Attributes:
        student: The student.
        loads_into: What takes the tensors by `load_state_dict(state, strict=False)`, in Python.
        tensors: Number of tensors.
        parameters: Number of parameters, running statistics not counted.
        run: The run's folder.
        digests: SHA-256 of each file by its name.
    """

    student: StudentDescription
    loads_into: list[str]
    tensors: int
    parameters: int
    run: str
    digests: dict[str, str]


def export_backbone(
    run: Path, output: Path, which: str | None = None, *, trust: bool = False
) -> Exported:
    """Writes the backbone of a run's student: 32-bit floats, on the CPU.

    Args:
        run: Folder of a finished run, or any that holds a student.
        output: Folder of the files; those of an earlier export in it are replaced.
        which: Which student, and
        trust: whether it may be any network; see `mtkd_env.load_student`.

    Raises:
        ConfigError: There is no student, or it is of another network than it says.
        OSError: Something cannot be written.
    """
    if output.parent == run:
        refuse_links(run)
    path, student = describe_student(run, which)
    trained = load_checkpoint(path)
    with Trust(None if trust else frozenset()).applied():
        network, other = (_skeleton(student, classes) for classes in CLASSES)
    kept = _kept(network, other)
    with errors_of(f"{path}: not the '{student.network}' that it says"):
        check_same_tensors({name: trained[name] for name in kept if name in trained}, kept)
    state = plain_tensors({name: trained[name] for name in kept})
    (output / ABOUT).unlink(missing_ok=True)
    save_checkpoint(output / TORCH, state)
    save_tensors(output / SAFETENSORS, state)
    parameters = network.library_state(dict(network.named_parameters()))
    exported = Exported(
        student=student,
        loads_into=takers(student),
        tensors=len(state),
        parameters=sum(p.numel() for n, p in parameters.items() if n in kept),
        run=str(run.resolve()),
        digests={name: file_digest(output / name) for name in (TORCH, SAFETENSORS)},
    )
    write_text(output / ABOUT, json.dumps(asdict(exported), indent=2) + "\n")
    return exported


def _skeleton(student: StudentDescription, classes: int) -> Network:
    """A student's network for another number of classes."""
    with errors_of(
        f"cannot tell the classifier of '{student.network}' from the rest, for which it is made "
        f"once more for {classes} classes"
    ):
        return replace(student, num_classes=classes).build()


def _kept(network: Network, other: Network) -> dict[str, Tensor]:
    """The tensors whose shapes do not depend on the number of classes."""
    own, theirs = (one.library_state(one.state_dict()) for one in (network, other))
    return {name: one for name, one in own.items() if theirs[name].shape == one.shape}


def takers(student: StudentDescription, *, whole: bool = False) -> list[str]:
    """What takes a student's tensors by `load_state_dict`, in Python.

    A ResNet has the same names in several libraries; other networks have those of their own.

    Args:
        student: The student.
        whole: Whether the classifier is among them; without it, what takes them may lack it, which
            `strict=False` allows.
    """
    library, _, model = student.network.rpartition(":")
    own = "".join(f", {name}={value!r}" for name, value in student.arguments.items())
    classes, in_channels = student.num_classes, student.preprocessing.image_shape[0]
    channels = "" if in_channels == 3 else f", in_chans={in_channels}"
    inputs = "" if in_channels == 3 else f" with a first convolution of {in_channels} channels"
    count = f", num_classes={classes}" if whole else ""
    known = {
        "torchvision": f"torchvision.models.get_model('{model}'{count}{own}){inputs}",
        "timm": f"timm.create_model('{model}', num_classes={whole * classes}{channels}{own})",
    }
    if library in known and model in RESNETS and not own:
        encoder = f"'{model}', in_channels={in_channels}, weights=None"
        smp = f"segmentation_models_pytorch.encoders.get_encoder({encoder})"
        return list(known.values()) if whole else [*known.values(), smp]
    if library in known:
        return [known[library]]
    if library:
        return [f"{library}.{model.partition('@')[0]}"]
    width = "" if student.width == 1 else f", width={student.width}"
    shape = f"num_classes={classes if whole else 'C'}, in_channels={in_channels}"
    return [f"mtkd_env.networks.build_network('{model}', {shape}{width}{own})"]


def load_backbone(path: Path) -> Mapping[str, Tensor]:
    """The tensors of an exported backbone, on the CPU.

    Args:
        path: `backbone.safetensors` or `backbone.pt`, or the folder of the export. If the
            `backbone.json` of an export that names the file lies beside it, the digest is checked.

    Raises:
        ConfigError: No such file, one that holds something else, or another one than was exported.
    """
    path = path / TORCH if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"weights: {path}: no such file")
    _check_digest(path)
    state = load_checkpoint(path)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"weights: {path}: expected tensors only, found {type(value).__name__} '{name}'"
            )
    return state


def _check_digest(path: Path) -> None:
    try:
        about = json.loads((path.parent / ABOUT).read_text(encoding="utf-8"))
        expected = about["digests"].get(path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if expected is not None and (found := file_digest(path)) != expected:
        raise ConfigError(
            f"weights: {path}: not the file that was exported: expected SHA-256 {expected[:16]}, "
            f"got {found[:16]}"
        )


@torch.no_grad()
def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills a network's body with all of a backbone's tensors, and nothing else.

    Args:
        module: The body, whose tensors have the backbone's names: a ResNet of torchvision's, the
            part of one that a detector keeps, or an encoder of segmentation-models-pytorch.
        state: What `load_backbone` gave.

    Raises:
        ConfigError: A tensor of either is missing in the other, or has another shape; the module
            is as it was then.
    """
    own, given = (
        {name: tensor for name, tensor in one.items() if not name.endswith(COUNTER)}
        for one in (module.state_dict(), state)
    )
    with errors_of("weights: not the backbone of this network"):
        check_same_tensors(given, own)
    for name, tensor in own.items():
        tensor.copy_(given[name])
