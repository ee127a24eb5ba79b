"""What the programs of this package share: configuration and flags."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from experiments.config import (
    CONFIGS,
    RunConfig,
    file_layer,
    parse_values,
    take,
)
from experiments.running.folder import CONFIG
from experiments.running.result import RunResult
from experiments.transfer.backbones import BACKBONES
from experiments.transfer.schedule import Schedule
from mtkd_env import distributed
from mtkd_env.data.decoding import Asked, Product, default_workers, made
from mtkd_env.errors import (
    ConfigError,
    check_at_least_1,
    check_name,
    check_not_negative,
    lookup,
)
from mtkd_env.files import path_or_name, user_path, whole_path
from mtkd_env.precision import FULL, PRECISIONS

RECIPES = CONFIGS / "transfer"

# Where and how a run is computed; its numbers do not depend on it.
PLACE = (
    *("data", "output", "recipe", "evaluate_every", "workers", "device", "threads"),
    *("checkpoint", "method", "setting"),
)

# How long a training is; only one of them can be said.
LENGTHS = {"--schedule.epochs", "--schedule.iterations"}


@dataclass(frozen=True, kw_only=True)
class TransferConfig(RunConfig):
    """The training of a network for another task than distillation's, from a distilled backbone.

    Attributes:
        data: Folder of the images.
        output: Folder of the run.
        recipe: Name of an experiment of the paper, which selects configs/transfer/<recipe>.yaml, or
            a YAML file.
        backbone: resnet18, resnet34 or resnet50.
        weights: The backbone's tensors, as mtkd export wrote them; at random by default.
        batch_size: Images in a batch, those of all processes together.
        schedule: How the network is trained.
        evaluate_every: Epochs between two evaluations; 0 for none but the one at the end.
        precision: fp32, bf16 or fp16.
        workers: Processes that read images, for each process that trains; one per core up to eight
            by default, and 0 reads in the process that trains.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        method: What tables call the backbone; by default the name of its file.
        setting: What they call the setting that it is used in.

    Raises:
        ConfigError: A value that cannot be used; names it.
    """

    data: str
    output: str = field()
    recipe: str | None = None
    backbone: str = "resnet34"
    weights: str | None = None
    batch_size: int = 16
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=24))
    evaluate_every: int = 1
    precision: str = FULL
    workers: int | None = None
    device: str = "auto"
    method: str | None = None
    setting: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_1(batch_size=self.batch_size)
        check_not_negative(evaluate_every=self.evaluate_every, workers=self.workers or 0)
        check_name(PRECISIONS, self.precision, "precision")
        check_name(BACKBONES, self.backbone, "backbone")
        # Makes what the run reads findable from another working directory.
        for name in ("data", "weights", "recipe"):
            value = getattr(self, name)
            if value is not None and (name != "recipe" or path_or_name(value)):
                object.__setattr__(self, name, whole_path(value))

    def steps_per_epoch(self, images: int) -> int:
        """Batches in an epoch, without the last one if it is not full.

        Args:
            images: Number of images to train on.

        Raises:
            ConfigError: A batch is larger than that, or the processes cannot share it.
        """
        if self.batch_size > images:
            raise ConfigError(
                f"batch_size: expected at most {images}, the number of images in {self.data} to "
                f"train on, got {self.batch_size}"
            )
        if self.batch_size % distributed.processes():
            raise ConfigError(
                f"batch_size: expected a multiple of {distributed.processes()}, the number of "
                f"processes, got {self.batch_size}"
            )
        return images // self.batch_size

    @property
    def digest(self) -> str:
        """Digest of everything that the numbers of a run depend on; not of where it runs."""
        values = {k: v for k, v in asdict(self).items() if k not in PLACE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        """What tables call the backbone."""
        return self.method or ("random" if self.weights is None else Path(self.weights).stem)

    def read(
        self, make: Callable[[Asked], Product], requests: Sequence[Asked], device: torch.device
    ) -> Iterator[Product]:
        """What is made of every request, in order, by processes that read ahead for a device."""
        workers = default_workers() if self.workers is None else self.workers
        pin = device.type == "cuda"
        return made(make, requests, workers=min(workers, len(requests)), pin=pin)


@dataclass(frozen=True, kw_only=True)
class TaskResult(RunResult):
    """What the training of a task's network came to; says more than other results.

    Attributes:
        metrics: All metrics at the end, the main one first.
        best_metrics: All metrics where the main one was the highest.
        steps: SGD steps.
        parameters: Number of the network's parameters.
    """

    metrics: dict[str, float]
    best_metrics: dict[str, float]
    steps: int
    parameters: int


Config = TypeVar("Config", bound=TransferConfig)


def parse(kind: type[Config], argv: Sequence[str], program: str) -> tuple[Config, bool]:
    """The configuration that a command line asks for, and whether its run is to be gone on with.

    Layers, later ones win: `configs/transfer/<recipe>.yaml`, `--config` files, flags. `--resume
    FOLDER` takes the configuration of the run in the folder instead of a recipe.

    Args:
        kind: Class of the configuration.
        argv: Flags, without the program's name.
        program: The program's name, for its help.

    Raises:
        ConfigError: An unknown key, a value that cannot be used, a file that cannot be read, or a
            flag that would make a run another one.
        SystemExit: After `--help` or `--print_config`.
    """
    resumed, flags = take(argv, "--resume")
    recipes, flags = take(flags, "--recipe")
    named, flags = take(flags, "--config")
    if resumed and recipes:
        raise ConfigError("--recipe: cannot be given with --resume")
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    about = (
        "Trains a network that begins with a distilled backbone. Layers, later ones win: "
        "configs/transfer/RECIPE.yaml, --config files, flags. --resume FOLDER goes on with an "
        f"unfinished run. Recipes: {', '.join(sorted(shipped))}."
    )
    first, last = [], []
    if resumed:
        folder = user_path(resumed[-1])
        first = [file_layer(folder / CONFIG, flag="--resume")]
        last = ["--output", str(folder)]
    elif recipes:
        path = path_or_name(recipes[-1]) or lookup(shipped, recipes[-1], "recipe")
        first, last = [file_layer(path, flag="--recipe")], ["--recipe", recipes[-1]]
    layers = [*first, *(file_layer(user_path(path)) for path in named)]
    flags = _one_length([*flags, *last])
    return parse_values(kind, layers, flags, program, about), bool(resumed)


def _one_length(flags: Sequence[str]) -> list[str]:
    """The flags, with one that takes back the other length if only one of the two is given."""
    given = {flag.partition("=")[0] for flag in flags} & LENGTHS
    others = LENGTHS - given if len(given) == 1 else set()
    return [*flags, *(f"{other}=null" for other in others)]
