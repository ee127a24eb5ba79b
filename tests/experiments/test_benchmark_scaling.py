"""How the cost of a step grows, on synthetic images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarking import config_of, one_line_error, read, start
from experiments.benchmarks import Request
from experiments.benchmarks.scaling import AXES, Point, Scaling, Setting
from experiments.benchmarks.synthetic import write_noise
from experiments.benchmarks.timing_report import costs
from tiny import load_dataset

SETTING = Setting(teachers=2, batch=16, width=1.0, size=8)


@pytest.mark.parametrize("axis", AXES)
def test_along_an_axis_nothing_else_changes(axis: str) -> None:
    settings = SETTING.along(axis)
    assert [getattr(setting, axis) for setting in settings] == list(AXES[axis])
    others = [{**vars(setting), axis: None} for setting in settings]
    assert others == [{**vars(SETTING), axis: None}] * len(AXES[axis])


def test_a_larger_pool_holds_the_networks_again_untrained_and_different() -> None:
    spec = config_of("aver").teachers
    pool = Setting(teachers=5, batch=16, width=2.0, size=8).pool(spec)
    networks = [teacher.network for teacher in pool.teachers]
    assert networks == ["resnet8", "wrn_16_1", "resnet8", "wrn_16_1", "resnet8"]
    assert {(teacher.kind, teacher.width) for teacher in pool.teachers} == {("random", 0.25)}
    assert [teacher.seed for teacher in pool.teachers] == list(range(5))


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_has_the_asked_size_and_every_class(channels: int, tmp_path: Path) -> None:
    path = write_noise(tmp_path, channels=channels, classes=4, side=9, count=10)
    images = load_dataset("npz", path=str(path))
    assert images.image_shape == (channels, 9, 9)
    assert images.num_classes == 4
    assert len(images.split().train) == 10
    few = write_noise(tmp_path, channels=channels, classes=4, side=9, count=1)
    assert load_dataset("npz", path=str(few)).num_classes == 4


def test_the_exponent_is_that_of_a_power_law() -> None:
    took = {"aver": [1.0, 2.0, 4.0], "pg": [3.0, 12.0, 48.0]}
    points = [
        Point(
            value=value,
            features=10,
            setting=replace(SETTING, teachers=value),
            costs=costs({name: [{"CPU": one[place]}] * 2 for name, one in took.items()}),
        )
        for place, value in enumerate((1, 2, 4))
    ]
    request = Request([], None, steps=4, rounds=2, epochs=(), out=Console())
    configs = dict.fromkeys(took, config_of("aver"))
    scaling = Scaling(request, configs, load_dataset("digits"), torch.device("cpu"))
    exponents = scaling.exponents(points)
    assert exponents["aver"] == pytest.approx(1)
    assert exponents["pg"] == pytest.approx(2)
    assert points[1].costs["pg"]["CPU"].ratio.median == 6


@pytest.mark.slow
def test_axes_from_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AXES, "batch", (4, 8))  # type: ignore[arg-type]
    monkeypatch.setitem(AXES, "size", (8, 12))  # type: ignore[arg-type]
    path = tmp_path / "scaling.json"
    flags = ("--axes", "batch,size", "--rounds", "1", "--steps", "2", "--json", str(path))
    assert start("scaling", *flags) == 0
    shown = capsys.readouterr().out
    for text in ("against batch B", "against side of the images", "synthetic: ", "µs/image"):
        assert text in shown
    found = read(path)
    assert [(point["batch"], point["size"]) for point in found["points"]] == [
        (4, 8),
        (8, 8),
        (16, 8),
        (16, 12),
    ]
    assert {point["teachers"] for point in found["points"]} == {2}
    assert set(found["exponents"]) == {"batch", "size"}
    assert all(list(point["methods"]) == ["aver", "pg"] for point in found["points"])
    values = [point["methods"]["pg"]["CPU"]["milliseconds"] for point in found["points"]]
    assert all(np.isfinite(value["median"]) and value["median"] > 0 for value in values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--axes", "batches"], "unknown axis 'batches'; did you mean 'batch'?"),
        (["--axes", "batch,,size"], "--axes: expected names with commas between them"),
        (["--variant", "a=--seed 1"], "--variant: means nothing to --what scaling"),
        (["--methods", "pgg"], "pgg"),
    ],
)
def test_wrong_flags_of_scaling_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert start("scaling", *flags) == 2
    assert message in one_line_error(capsys)
