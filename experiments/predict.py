"""Lets a finished run's student classify images: a CSV file with the class and all probabilities.

mtkd predict runs/digits_ppo_seed0_20260131-120000 my_images
mtkd predict runs/digits_ppo_seed0_20260131-120000 a.png b.png --output two.csv

Folders are searched to the bottom, without hidden files. An image that cannot be read is left out,
and named at the end. Neither data nor teachers are needed.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from experiments.console import console, live_bar
from experiments.running.failures import Parser, path_argument, program
from mtkd_env.computing import find_device
from mtkd_env.data.decoding import CHUNK, default_workers, made
from mtkd_env.data.folder import NO_IMAGES
from mtkd_env.data.preprocessing import Preprocessing
from mtkd_env.data.reading import image_files
from mtkd_env.errors import ConfigError, check_not_negative
from mtkd_env.files import write_atomically
from mtkd_env.imports import TRUST
from mtkd_env.student import STEMS, Student, load_student

# Of fewer images, processes that read them take longer to start than they save.
MANY = 512

# What can be read of a chunk of images, and why each other one cannot.
Read = tuple[list[Path], list[Tensor], list[str]]


def found_images(given: Sequence[Path]) -> list[Path]:
    """Files, and the images in folders and those below them, without hidden ones.

    Raises:
        ConfigError: There is no such file or folder, or no image in a folder.
    """
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
        images = [path / name for name in image_files(path)] if path.is_dir() else [path]
        if not images:
            raise ConfigError(f"{path}: {NO_IMAGES}")
        found += images
    return found


def read_images(transform: Preprocessing, paths: Sequence[Path]) -> Read:
    """Images as a student takes them, without those that cannot be read."""
    read: Read = [], [], []
    for path in paths:
        try:
            read[1].append(transform(path))
            read[0].append(path)
        except ConfigError as error:
            read[2].append(str(error))
    return read


@torch.no_grad()
def predictions(
    student: Student, paths: Sequence[Path], *, workers: int
) -> Iterator[tuple[list[Path], Tensor, list[str]]]:
    """Probabilities of the classes for some images, chunk by chunk.

    Args:
        student: The student.
        paths: Their files.
        workers: Processes that read them; 0 reads them in this one.

    Yields:
        Files that could be read, the probabilities (B, C) for each of them on the CPU, and why each
        of the others could not.

    Raises:
        ConfigError: The student takes no pictures, or a process that reads them was killed.
    """
    # What is said of every picture is said once.
    student.transform(Image.new("RGB", (8, 8)))
    device = next(student.parameters()).device
    chunks = [paths[begin : begin + CHUNK] for begin in range(0, len(paths), CHUNK)]
    make = partial(read_images, student.transform)
    for read, inputs, unread in made(make, chunks, workers=workers, pin=False, flag="--workers"):
        logits = student(torch.stack(inputs).to(device)) if inputs else torch.empty(0, 0)
        yield read, logits.softmax(1).cpu(), unread


def write_predictions(
    student: Student, paths: Sequence[Path], output: Path, *, workers: int
) -> list[str]:
    """Writes `file`, `class` and the probability of every class, a line for each image.

    Returns:
        Why each image that is left out cannot be read.
    """
    unreadable: list[str] = []

    def write(temporary: Path) -> None:
        classes = student.about.classes
        bar = live_bar(console(stderr=True))
        with bar, temporary.open("w", encoding="utf-8", newline="") as file:
            task = bar.add_task("images", total=len(paths), text="")
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["file", "class", *classes])
            for read, probabilities, unread in predictions(student, paths, workers=workers):
                for path, shares in zip(read, probabilities, strict=True):
                    likeliest = classes[int(shares.argmax())]
                    shown = [f"{share:.6f}" for share in shares.tolist()]
                    rows.writerow([path.as_posix(), likeliest, *shown])
                unreadable.extend(unread)
                bar.advance(task, len(read) + len(unread))

    write_atomically(output, write)
    return unreadable


def students_parser(prog: str, description: str | None) -> Parser:
    """A parser of what programs take that use the student of a run."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("run", type=path_argument, help="folder of a finished run")
    parser.add_argument(
        "--which",
        choices=list(STEMS),
        help="the student of the last epoch, or of the one that is best on validation images "
        "(default: the best if there is one)",
    )
    parser.add_argument(
        TRUST, action="store_true", help="the run may name a network of any module, which then runs"
    )
    return parser


def _parser() -> Parser:
    parser = students_parser("mtkd predict", __doc__)
    parser.add_argument(
        "images", type=path_argument, nargs="+", help="images, or folders that are searched"
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("predictions.csv"),
        help="the file (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--workers",
        type=int,
        help=f"processes that read images (default: one per core up to eight, none for fewer than "
        f"{MANY} images)",
    )
    return parser


@program("nothing was written")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    arguments = _parser().parse_args(argv)
    device = find_device(arguments.device)
    student = load_student(arguments.run, arguments.which, device=device, trust=arguments.trust)
    paths = found_images(arguments.images)
    workers = arguments.workers
    if workers is None:
        workers = default_workers() if len(paths) >= MANY else 0
    check_not_negative(workers=workers)
    unreadable = write_predictions(student, paths, arguments.output, workers=workers)
    read = len(paths) - len(unreadable)
    sys.stdout.write(f"{arguments.output}: {read} images by {student.about.title}\n")
    if unreadable:
        left_out = f"{len(unreadable)} of {len(paths)} images are left out"
        raise ConfigError(f"{left_out}: {'; '.join(unreadable)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
