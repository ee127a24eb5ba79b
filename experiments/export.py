"""Exports a finished run's student, as a whole or without its classifier.

mtkd export runs/imagenet_pg_seed0_20260131-120000 --to onnx
mtkd export runs/imagenet_pg_seed0_20260131-120000 --to backbone --output resnet34

Neither data nor teachers are needed. A whole student takes normalised images, of which the .json
file beside it tells; its logits are compared with the original's on images of the run before the
file is there.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from experiments.formats import FORMATS, INPUT, Format
from experiments.gallery import MOST_IMAGES, read_gallery
from experiments.predict import found_images, students_parser
from experiments.running.failures import Parser, path_argument, program
from experiments.transfer.backbones import export_backbone, takers
from mtkd_env.errors import ConfigError
from mtkd_env.files import file_digest, refuse_links, write_atomically, write_text
from mtkd_env.student import Student, load_student

BACKBONE = "backbone"

# Largest difference of a logit, as a share of the largest logit, that rounding may make.
TOLERANCE = 1e-4


def export_student(student: Student, path: Path, to: str, images: Tensor) -> float:
    """Writes a student in another form, once its logits are known to be the original's.

    Args:
        student: The student, on the CPU.
        path: The file.
        to: Name of the form.
        images: Normalised images to compare on.

    Returns:
        Largest difference of a logit. A file beside it says this too: the student, the form and
        what it takes, on how many images it was compared, and its SHA-256.

    Raises:
        ConfigError: The logits are others; nothing is written then.
        ModuleNotFoundError: A package that the form needs is not installed.
        OSError: Something cannot be written.
    """
    differences: list[float] = []

    def write(temporary: Path) -> None:
        # Two images, since of one it could be taken for a constant that there is one.
        FORMATS[to].write(student, images[:2].repeat(2, 1, 1, 1)[:2], temporary)
        differences.append(largest_difference(student, FORMATS[to], temporary, images))

    write_atomically(path, write)
    shape = ", ".join(map(str, student.transform.image_shape))
    exported = {
        "student": asdict(student.about),
        "form": to,
        "takes": f"{INPUT}: float32 (N, {shape}), normalised: (value / 255 - mean) / std",
        "images": len(images),
        "difference": differences[0],
        "digest": file_digest(path),
    }
    write_text(path.with_name(f"{path.name}.json"), f"{json.dumps(exported, indent=2)}\n")
    return differences[0]


@torch.no_grad()
def largest_difference(student: Student, form: Format, path: Path, images: Tensor) -> float:
    """Largest difference between the logits of a student and those of its file.

    Raises:
        ConfigError: It is more than rounding makes.
    """
    expected = student(images)
    difference = float((form.read(student, path)(images) - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    # Written so that NaN fails.
    if not difference <= allowed:
        raise ConfigError(
            f"{form.file}: not the student any more: on {len(images)} images its logits differ by "
            f"up to {difference:.1e}, expected {allowed:.1e} at most"
        )
    return difference


def comparable_images(run: Path, student: Student, given: Path | None) -> Tensor:
    """Normalised images to compare on: the user's, or those that the run has kept.

    Raises:
        ConfigError: There are none, or one that cannot be read.
    """
    if given is not None:
        paths = found_images([given])[:MOST_IMAGES]
        return torch.stack([student.transform(path) for path in paths])
    gallery = read_gallery(run)
    if gallery is None or gallery.images.shape[1:] != student.transform.image_shape:
        raise ConfigError(f"{run}: holds no images to compare on; --images names a folder of some")
    return student.transform.normalized(torch.from_numpy(gallery.images))


def _parser() -> Parser:
    parser = students_parser("mtkd export", __doc__)
    forms = "".join(f"; {name}: {form.about}" for name, form in FORMATS.items())
    parser.add_argument(
        "--to",
        choices=[BACKBONE, *FORMATS],
        default=BACKBONE,
        help=f"{BACKBONE} (default): tensors without the classifier's{forms}",
    )
    parser.add_argument(
        "--output", type=path_argument, help="folder of the files (default: RUN/backbone or export)"
    )
    parser.add_argument(
        "--images", type=path_argument, help="images to compare on (default: some of the run's)"
    )
    return parser


@program("an export without its .json file is unfinished")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    arguments = _parser().parse_args(argv)
    lines = (_backbone if arguments.to == BACKBONE else _whole)(arguments)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _backbone(arguments: Namespace) -> list[str]:
    output = arguments.output or arguments.run / BACKBONE
    exported = export_backbone(arguments.run, output, arguments.which, trust=arguments.trust)
    network, parameters = exported.student.network, f"{exported.parameters:,} parameters"
    first = f"{output}: {exported.tensors} tensors of {network}, {parameters}"
    return [first, *(f"loads into {taker}" for taker in exported.loads_into)]


def _whole(arguments: Namespace) -> list[str]:
    run, to = arguments.run, arguments.to
    path = (arguments.output or run / "export") / FORMATS[to].file
    student = load_student(run, arguments.which, trust=arguments.trust)
    images = comparable_images(run, student, arguments.images)
    refuse_links(path.parent)
    difference = export_student(student, path, to, images)
    first = (
        f"{path}: {student.about.title}; on {len(images)} images its "
        f"logits differ by {difference:.1e} at most"
    )
    loads_into = takers(student.about, whole=True) if to == "torch" else []
    return [first, *(f"loads into {taker}" for taker in loads_into)]


if __name__ == "__main__":
    sys.exit(main())
