"""Every recipe of the paper starts and runs, its student and all of its teachers at full size."""

import json
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR100

from experiments import run
from experiments.config import parse_arguments, shipped_recipes
from experiments.running.log import read_rows
from fake_datasets import WORDNET_IDS, write_cifar, write_images

BATCH, IMAGES, EPOCHS = 4, 40, 2
STEPS = EPOCHS * IMAGES // BATCH

GIBIBYTE = 2**30
# Of the largest, 164 million parameters of teachers and what a step of four images needs.
MOST_MEMORY = 6 * GIBIBYTE


def start(recipe: str, folder: str) -> int:
    """Runs a recipe on fake data with untrained teachers; gives the peak of the memory [bytes]."""
    root = Path(folder)
    config = parse_arguments(["--recipe", recipe])[0]
    teachers = [
        {"network": teacher.network, "arguments": teacher.arguments, "kind": "random"}
        for teacher in config.teachers.teachers
    ]
    with pytest.MonkeyPatch.context() as patch:
        if config.data.dataset == "cifar100":
            write_cifar(root, CIFAR100, patch)
            images = ["--data.arguments.download", "false"]
        else:
            write_images(root, classes=WORDNET_IDS, count=IMAGES // len(WORDNET_IDS))
            images = ["--data.arguments.workers", "0", "--optimizer.warmup_epochs", "1"]
        flags = ["--recipe", recipe, "--algo", "pg", "--epochs", str(EPOCHS), "--device", "cpu"]
        flags += ["--data.arguments.root", folder, "--data.train_size", str(IMAGES), *images]
        flags += ["--data.batch_size", str(BATCH), "--output", str(root / "runs")]
        # Feature maps of untrained residual networks are too large to be imitated.
        flags += ["--distillation.beta", "0", "--teachers.teachers", json.dumps(teachers)]
        assert run.main([*flags, "--cache", str(root / "cache"), "--checkpoint.epochs", "0"]) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", sorted(name for name in shipped_recipes() if not name.startswith("specialists_"))
)
def test_a_recipe_runs_twenty_steps_at_full_size(
    recipe: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert STEPS == 20
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        memory = process.submit(start, recipe, str(tmp_path)).result()
    (folder,) = (tmp_path / "runs").iterdir()
    assert [row["epoch"] for row in read_rows(folder)] == [1, 2]
    record_property("peak memory [GiB]", round(memory / GIBIBYTE, 2))
    assert memory < MOST_MEMORY
