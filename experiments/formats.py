"""Forms in which a student can be used without this package; to add one is a line in the table."""

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtkd_env.files import load_checkpoint
from mtkd_env.networks.libraries import LIBRARIES
from mtkd_env.student import Student, plain_tensors
from mtkd_env.teachers.weights import load_state

# What the only input and output of a graph are called.
INPUT, OUTPUT = "images", "logits"

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """A form in which a student can be used.

    Attributes:
        file: Name of its file.
        about: What that holds.
        write: Writes the file, given a student on the CPU and some images that it takes.
        read: What gives logits by the file alone, given the student for what it is.
    """

    file: str
    about: str
    write: Callable[[Student, Tensor, Path], None]
    read: Callable[[Student, Path], Logits]


def write_torch(student: Student, images: Tensor, path: Path) -> None:
    """The `state_dict`, in the names of the network's own library."""
    del images
    network = student.network
    with path.open("wb") as file:
        torch.save(plain_tensors(network.library_state(network.state_dict())), file)


def read_torch(student: Student, path: Path) -> Logits:
    """The network as its own library has it, with all of the tensors."""
    about, state = student.about, load_checkpoint(path)
    library, _, model = about.network.partition(":")
    if library not in LIBRARIES:
        network = copy.deepcopy(student.network)
        load_state(network, state, str(path))
        return Student(network, about).eval()
    channels = about.preprocessing.image_shape[0]
    made = LIBRARIES[library].classifier(model, about.num_classes, channels, about.arguments)
    made.load_state_dict(state)
    return made.eval()


def write_torchscript(student: Student, images: Tensor, path: Path) -> None:
    """The recorded operations."""
    with _unwarned():
        torch.jit.save(torch.jit.trace(student, images), path)


def read_torchscript(student: Student, path: Path) -> Logits:
    """The recorded operations."""
    del student
    with _unwarned():
        loaded: nn.Module = torch.jit.load(path)
    return loaded


@contextmanager
def _unwarned() -> Iterator[None]:
    """Hides that torch advises against what was asked for, and what the comparison would show."""
    with warnings.catch_warnings():
        traced = torch.jit.TracerWarning  # type: ignore[attr-defined] # torch does not list it
        warnings.simplefilter("ignore", traced)
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        yield


def write_torch_export(student: Student, images: Tensor, path: Path) -> None:
    """The exported program, for any number of images."""
    torch.export.save(torch.export.export(student, (images,), dynamic_shapes=_any_number()), path)


def write_onnx(student: Student, images: Tensor, path: Path) -> None:
    """The graph, with its weights, for any number of images."""
    # Of these torch needs the former two; what is missing is told before anything is written.
    for package in ("onnx", "onnxscript", "onnxruntime"):
        importlib.import_module(package)
    torch.onnx.export(
        student,
        (images,),
        path,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=_any_number(),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def read_onnx(student: Student, path: Path) -> Logits:
    """What ONNX Runtime makes of the graph on the CPU."""
    del student
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _any_number() -> tuple[dict[int, Any]]:
    """Of the only input, the first axis may have any length."""
    return ({0: torch.export.Dim("batch")},)


FORMATS: dict[str, Format] = {
    "torch": Format(
        "student.pt", "a state_dict in the names of its library", write_torch, read_torch
    ),
    "torchscript": Format(
        "student.ts", "TorchScript, for torch.jit.load", write_torchscript, read_torchscript
    ),
    "torch_export": Format(
        "student.pt2",
        "an exported program, for torch.export.load",
        write_torch_export,
        lambda _, path: torch.export.load(path).module(),
    ),
    "onnx": Format("student.onnx", "ONNX", write_onnx, read_onnx),
}
