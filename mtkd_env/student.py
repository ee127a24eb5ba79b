"""A trained student that stands alone: its weights, and all that it takes to use them.

Two files beside each other: `student.safetensors`, tensors in the names of the network's own
library, and `student.json`, which says what network they are of and what it takes and gives.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mtkd_env.data.preprocessing import Preprocessing
from mtkd_env.errors import ConfigError, check_name, errors_of
from mtkd_env.files import (
    DESCRIPTION,
    TENSORS,
    load_checkpoint,
    read_description,
    save_described,
    user_path,
)
from mtkd_env.imports import Trust
from mtkd_env.networks import Network, build_network
from mtkd_env.options import Options, build
from mtkd_env.teachers.weights import load_state

# The student of the last epoch, and of the one that is best on validation images, if there are any.
STEMS = {"last": "student", "best": "student_best"}

# All that a folder of a student may hold.
FILES = tuple(f"{stem}{suffix}" for stem in STEMS.values() for suffix in (TENSORS, DESCRIPTION))


@dataclass(frozen=True)
class StudentDescription(Options):
    """What a student's file is of, and what `student.json` says.

    Attributes:
        network: Name of the network; see `find_network`.
        width: Factor on its channels.
        arguments: Its further arguments.
        num_classes: C, the number of its logits.
        preprocessing: What is made of an image before the network sees it.
        class_names: Name of each class; empty if they have none.
        metrics: What is known of it, such as its accuracy on the test images.
        sha256: Digest of the file of its tensors; empty before it is written.
    """

    network: str
    width: float
    arguments: dict[str, Any]
    num_classes: int
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class that no other has: its own, its number, or both."""
        names = self.class_names or tuple(map(str, range(self.num_classes)))
        return tuple(
            f"{name} ({number})" if names.count(name) > 1 else name
            for number, name in enumerate(names)
        )

    @property
    def title(self) -> str:
        """Its network, and the epoch that it is of if that is known."""
        epoch = self.metrics.get("epoch")
        return self.network if epoch is None else f"{self.network} after epoch {epoch}"

    def build(self, *, seed: int = 0) -> Network:
        """A freshly initialised network of the kind.

        Raises:
            ConfigError: It cannot be made.
        """
        channels, height, width = self.preprocessing.image_shape
        return build_network(
            self.network,
            num_classes=self.num_classes,
            in_channels=channels,
            image_size=(height, width),
            width=self.width,
            seed=seed,
            **self.arguments,
        )


class Student(nn.Module):
    """A trained student.

    Args:
        network: The network.
        about: What it is.

    Attributes:
        network: The network, which gives its features beside the logits.
        about: What it is.
        transform: Makes of an image, or of its file, what the student takes: (K, H, W).
        class_names: Name of each class; empty if they have none.
    """

    def __init__(self, network: Network, about: StudentDescription) -> None:
        super().__init__()
        self.network = network
        self.about = about
        self.transform = about.preprocessing
        self.class_names = about.class_names

    def forward(self, images: Float[Tensor, "B K H W"]) -> Float[Tensor, "B C"]:
        """Logits of normalised images."""
        return self.network(images).logits

    @torch.no_grad()
    def predict(self, *images: Image.Image | str | Path) -> Float[Tensor, "B C"]:
        """Probability of every class for some images, or those of files, on the CPU.

        Raises:
            ConfigError: An image that cannot be read; names it.
        """
        inputs = torch.stack([self.transform(image) for image in images])
        device = next(self.parameters()).device
        return self(inputs.to(device)).softmax(1).cpu()


def save_student(
    folder: Path,
    network: Network,
    about: StudentDescription,
    *,
    state: Mapping[str, Tensor] | None = None,
    which: str = "last",
) -> None:
    """Writes the two files of a student: 32-bit floats, from wherever they are.

    Args:
        folder: Where.
        network: The network.
        about: What it is.
        state: Its tensors, if they are not those that it has now.
        which: Of which epoch it is: last or best.

    Raises:
        OSError: A file cannot be written; names it.
    """
    tensors = plain_tensors(network.library_state(state or network.state_dict()))
    save_described(folder / f"{STEMS[which]}{TENSORS}", tensors, asdict(about))


def plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU that share memory with no other, which safetensors refuses."""
    wide = {name: one.float() if one.is_floating_point() else one for name, one in state.items()}
    layout = torch.contiguous_format
    return {name: one.detach().cpu().clone(memory_format=layout) for name, one in wide.items()}


def load_student(
    folder: str | Path,
    which: str | None = None,
    *,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> Student:
    """The student of a finished run, in evaluation mode.

    Args:
        folder: The run's folder, or any that holds the files of a student.
        which: `last`, the student of the last epoch, or `best`, that of the epoch that is best on
            validation images; by default the best if there is one.
        device: Where it is to be.
        trust: Whether the file may name a network of any module, which then runs.

    Raises:
        ConfigError: There is no such student, a damaged one, one of another network than its
            description says, or a network that is not to be trusted.
    """
    path, about = describe_student(folder, which)
    with Trust(None if trust else frozenset()).applied(), errors_of(path.with_suffix(DESCRIPTION)):
        network = about.build()
    load_state(network, load_checkpoint(path), str(path))
    return Student(network, about).to(device).eval()


def describe_student(
    folder: str | Path, which: str | None = None
) -> tuple[Path, StudentDescription]:
    """The file of a student's tensors, and what it says of itself; arguments as of `load_student`.

    Raises:
        ConfigError: See `load_student`.
    """
    path = _find(user_path(folder), which)
    about = read_description(path)
    with errors_of(path.with_suffix(DESCRIPTION)):
        return path, build(StudentDescription, about)


def _find(folder: Path, which: str | None) -> Path:
    """The file of the student that is asked for."""
    if which is not None:
        check_name(STEMS, which, "student")
    paths = {name: folder / f"{stem}{TENSORS}" for name, stem in STEMS.items()}
    asked = which or ("best" if paths["best"].is_file() else "last")
    if (described := paths[asked].with_suffix(DESCRIPTION)).is_file():
        return paths[asked]
    hint = {
        "best": "a run keeps its best student if it has validation images (data.val_fraction)",
        "last": "a run writes it when it is finished",
    }
    raise ConfigError(f"{described}: no such file; {hint[asked]}")
