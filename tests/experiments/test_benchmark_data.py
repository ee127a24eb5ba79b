"""What the images of a step cost."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarking import read, start
from experiments.benchmarks import data as data_benchmark
from experiments.benchmarks.loader import loaded_batches, pillow_images
from tiny import data


@pytest.mark.parametrize("channels", [1, 3])
def test_images_made_one_by_one_are_those_of_the_stream(channels: int) -> None:
    known = data()
    images = replace(
        known,
        x_train=known.x_train.repeat(1, channels, 1, 1),
        x_test=known.x_test.repeat(1, channels, 1, 1),
        crop_padding=0,
    )
    split = images.split().train
    made = pillow_images(images, split)
    (batch,) = images.evaluation_batches(split, len(split), device="cpu")
    assert len(made) == len(split)
    for position, (inputs, target) in enumerate(zip(batch.inputs, batch.targets, strict=True)):
        image, label = made[position]
        torch.testing.assert_close(image.as_subclass(torch.Tensor), inputs)
        assert label == int(target)


def test_loaded_batches_never_end_and_are_whole() -> None:
    images = data()
    batches = loaded_batches(images, images.split().train, 4, torch.device("cpu"))
    shapes = [(tuple(inputs.shape), tuple(targets.shape)) for inputs, targets in islice(batches, 5)]
    assert shapes == [((4, 1, 8, 8), (4,))] * 5


def test_data_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.json"
    flags = ("--rounds", "3", "--steps", "2", "--data.mixup", "0.2", "--json", str(path))
    assert start("data", *flags) == 0
    assert f"target: under {data_benchmark.TARGET:.0%}, " in capsys.readouterr().out
    found = read(path)
    assert list(found["methods"]) == ["aver", "stream", "torchvision"]
    ratios = {name: one["CPU"]["ratio"]["median"] for name, one in found["methods"].items()}
    assert 0 < ratios["stream"] < ratios["aver"] == 1
