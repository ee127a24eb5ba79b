"""Exports the backbone of a finished run's student: all of its tensors but the classifier's.

python experiments/export.py runs/imagenet_pg_seed0_20260131-120000
python experiments/export.py runs/imagenet_pg_seed0_20260131-120000 --output resnet34_distilled

Writes backbone.pt, backbone.safetensors and backbone.json, by default into the folder `backbone` of
the run. Neither data nor teachers are needed.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.command import as_called
from experiments.experiment import run_config
from experiments.gallery import read_gallery
from experiments.running.failures import Parser, path_argument, run_program
from mtkd_env.errors import ConfigError
from mtkd_env.files import (
    file_digest,
    load_checkpoint,
    refuse_links,
    save_checkpoint,
    write_atomically,
    write_text,
)
from mtkd_env.imports import TRUST
from mtkd_env.networks import Network, StudentSpec, build_network
from mtkd_env.networks.foreign import ForeignNetwork

TORCH, SAFETENSORS, ABOUT = "backbone.pt", "backbone.safetensors", "backbone.json"

# Networks whose tensors have the same names in torchvision, timm and segmentation-models-pytorch.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# Two numbers of classes; tensors whose shapes differ between them are the classifier's.
CLASSES = (2, 3)


@dataclass(frozen=True)
class Exported:
    """What an export came to, and what `backbone.json` says.

    Attributes:
        network: The student's network.
        width: Factor on its channels.
        arguments: Its further arguments.
        in_channels: Channels of the images that it takes.
        loads_into: What takes the tensors by `load_state_dict(state, strict=False)`, in Python.
        tensors: Number of tensors.
        parameters: Number of parameters, running statistics not counted.
        run: The run's folder.
        result: The run's result.
        digests: SHA-256 of each file by its name.
    """

    network: str
    width: float
    arguments: dict[str, Any]
    in_channels: int
    loads_into: list[str]
    tensors: int
    parameters: int
    run: str
    result: dict[str, Any]
    digests: dict[str, str]


def export_backbone(run: Path, output: Path, *, trust: bool = False) -> Exported:
    """Writes the backbone of a run's student: 32-bit floats, on the CPU.

    Args:
        run: Folder of a finished run.
        output: Folder of the files; those of an earlier export in it are replaced.
        trust: Whether the run may name a network of any module, which then runs.

    Raises:
        ConfigError: There is no run, an unfinished one, or one whose student is another network
            than its configuration says.
        OSError: Something cannot be written.
    """
    if output.parent == run:
        refuse_links(run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: expected the folder of a run, found no config.yaml")
    student, result = run_config(run, [TRUST] * trust).student, _read_result(run)
    trained = load_checkpoint(run / "student.pt").get("network", {})
    in_channels, image_size = _image_shape(run, trained)
    networks = [_skeleton(student, classes, in_channels, image_size) for classes in CLASSES]
    kept = _kept(*networks)
    _check_same(trained, kept, run, student.network)
    state = {_library_name(networks[0], name): _plain(trained[name]) for name in kept}
    (output / ABOUT).unlink(missing_ok=True)
    save_checkpoint(output / TORCH, state)
    write_atomically(output / SAFETENSORS, lambda path: save_file(state, path, {"format": "pt"}))
    exported = Exported(
        **asdict(student),
        in_channels=in_channels,
        loads_into=takers(student, in_channels),
        tensors=len(state),
        parameters=sum(p.numel() for n, p in networks[0].named_parameters() if n in kept),
        run=str(run.resolve()),
        result=result,
        digests={name: file_digest(output / name) for name in (TORCH, SAFETENSORS)},
    )
    write_text(output / ABOUT, json.dumps(asdict(exported), indent=2) + "\n")
    return exported


def _read_result(run: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{run}: expected a finished run, found one without result.json; to finish it: "
            f"{as_called('run.py')} --resume {run}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{run / 'result.json'}: damaged result ({error})") from error
    return result


def _image_shape(run: Path, trained: Mapping[str, Tensor]) -> tuple[int, tuple[int, int] | None]:
    """Channels of the images, and their height and width where the run shows some."""
    gallery = read_gallery(run)
    if gallery is not None:
        channels, height, width = gallery.images.shape[1:]
        return channels, (height, width)
    return next((tensor.shape[1] for tensor in trained.values() if tensor.ndim == 4), 3), None


def _skeleton(
    student: StudentSpec, classes: int, in_channels: int, image_size: tuple[int, int] | None
) -> Network:
    """A student's network without numbers."""
    try:
        with torch.device("meta"):
            return build_network(
                student.network,
                num_classes=classes,
                in_channels=in_channels,
                image_size=image_size,
                width=student.width,
                **student.arguments,
            )
    except ConfigError as error:
        raise ConfigError(
            f"cannot tell the classifier of '{student.network}' from the rest, for which it is "
            f"made once more for {classes} classes: {error}"
        ) from error


def _kept(network: Network, other: Network) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that do not depend on the number of classes."""
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    own = network.state_dict().items()
    return {name: tensor.shape for name, tensor in own if shapes[name] == tensor.shape}


def _check_same(
    trained: Mapping[str, Tensor], kept: Mapping[str, torch.Size], run: Path, network: str
) -> None:
    """Checks that a student's file holds the backbone of the network that the run names."""
    for name, shape in kept.items():
        found = tuple(trained[name].shape) if name in trained else "nothing"
        if found != tuple(shape):
            raise ConfigError(
                f"{run / 'student.pt'}: not the '{network}' of config.yaml: {name}: expected "
                f"{tuple(shape)}, found {found}"
            )


def _library_name(network: Network, name: str) -> str:
    """The name that a tensor has in its own library; here a part's name comes before it."""
    return name.partition(".")[2] if isinstance(network, ForeignNetwork) else name


def _plain(tensor: Tensor) -> Tensor:
    """A tensor that shares memory with no other, which safetensors refuses."""
    copy = tensor.float() if tensor.is_floating_point() else tensor
    return copy.clone(memory_format=torch.contiguous_format)


def takers(student: StudentSpec, in_channels: int) -> list[str]:
    """What takes the exported tensors by `load_state_dict(state, strict=False)`, in Python.

    Only the classifier is missing then, where there is one. A ResNet has the same names in several
    libraries; other networks have those of their own.
    """
    library, _, model = student.network.rpartition(":")
    own = "".join(f", {name}={value!r}" for name, value in student.arguments.items())
    channels = "" if in_channels == 3 else f", in_chans={in_channels}"
    inputs = "" if in_channels == 3 else f" with a first convolution of {in_channels} channels"
    known = {
        "torchvision": f"torchvision.models.get_model('{model}'{own}){inputs}",
        "timm": f"timm.create_model('{model}', num_classes=0{channels}{own})",
    }
    if library in known and model in RESNETS and not own:
        encoder = f"'{model}', in_channels={in_channels}, weights=None"
        smp = f"segmentation_models_pytorch.encoders.get_encoder({encoder})"
        return [*known.values(), smp]
    if library in known:
        return [known[library]]
    if library:
        return [f"{library}.{model.partition('@')[0]}"]
    width = "" if student.width == 1 else f", width={student.width}"
    shape = f"num_classes=C, in_channels={in_channels}"
    return [f"mtkd_env.networks.build_network('{model}', {shape}{width}{own})"]


def _parser() -> Parser:
    parser = Parser(
        prog="export.py",
        description=__doc__,
    )
    parser.add_argument("run", type=path_argument, help="folder of a finished run")
    parser.add_argument(
        "--output", type=path_argument, help="folder of the files (default: RUN/backbone)"
    )
    parser.add_argument(
        TRUST, action="store_true", help="the run may name a network of any module, which then runs"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; gives its exit code."""
    return run_program(_run, argv, "without backbone.json an export is unfinished")


def _run(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    output = arguments.output or arguments.run / "backbone"
    exported = export_backbone(arguments.run, output, trust=arguments.trust)
    sys.stdout.write(
        f"{output}: {exported.tensors} tensors of {exported.network}, "
        f"{exported.parameters:,} parameters\n"
        + "".join(f"loads into {taker}\n" for taker in exported.loads_into)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
