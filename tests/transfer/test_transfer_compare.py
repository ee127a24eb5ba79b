import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.transfer import compare
from experiments.transfer.compare import TABLES, configuration, load_comparison, main, planned
from experiments.transfer.program import TaskResult, TransferConfig
from mtkd_env import ConfigError
from mtkd_env.files import whole_path

TEXT = """
title: Trial
task: segmentation
baseline: alone
base: {backbone: resnet18}
settings:
  a_pspnet: {model: pspnet, recipe: ade20k, schedule: {lr: 0.5}}
  b_deeplabv3: {model: deeplabv3, backbone: resnet34, crop: [64, 32]}
weights:
  alone: {resnet18: random, resnet34: alone.pt}
  distilled: {resnet18: one.pt, resnet34: two.pt}
seeds: [0, 1]
paper:
  a_pspnet: {alone: 40.0}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trial.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[TransferConfig]:
    """The configurations of the runs that are done, in place of the runs."""
    configs: list[TransferConfig] = []

    def run(config: TransferConfig, folder: Path, *, resume: bool) -> TaskResult:
        assert resume
        configs.append(config)
        folder.mkdir(parents=True, exist_ok=True)
        metrics = {"miou": 0.25 + 0.125 * bool(config.weights) + 0.1 * config.seed, "other": 1.0}
        result = make_task_result(config, metrics, folder)
        (folder / "result.json").write_text(json.dumps(asdict(result)))
        return result

    kind, _ = compare.TASKS["segmentation"]
    monkeypatch.setitem(compare.TASKS, "segmentation", (kind, run))
    return configs


def make_task_result(config: TransferConfig, metrics: dict[str, float], folder: Path) -> TaskResult:
    main = next(iter(metrics))
    return TaskResult(
        method=config.label,
        setting=config.setting,
        seed=config.seed,
        metric=main,
        last=metrics[main],
        best=metrics[main],
        best_epoch=1,
        epochs=1,
        seconds=1.0,
        folder=str(folder),
        versions={},
        metrics=metrics,
        best_metrics=metrics,
        steps=1,
        parameters=1,
    )


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_setting_of_a_shipped_table_is_a_run(path: Path, tmp_path: Path) -> None:
    names = ("resnet18", "resnet34", "resnet50")
    given = [f"{name}:{net}={name}_{net}.pt" for name in ("baseline", "mtkd_rl") for net in names]
    comparison = load_comparison(path.stem, given)
    for run in planned(comparison, tmp_path, ["*"]):
        config = configuration(comparison, run, ["--data", "nowhere"])
        assert config.weights == whole_path(f"{run.weights}_{config.backbone}.pt")
        assert config.output == str(run.folder)


def test_settings_are_laid_over_their_recipe_and_flags_over_both(
    file: Path, tmp_path: Path
) -> None:
    comparison = load_comparison(str(file))
    runs = planned(comparison, tmp_path, ["*"])
    assert [(run.setting[0], run.weights, run.seed) for run in runs] == [
        (setting, weights, seed)
        for setting in "ab"
        for weights in ("alone", "distilled")
        for seed in (0, 1)
    ]
    flags = ["--data=here", "--schedule.iterations=7"]
    first = configuration(comparison, runs[0], flags)
    assert (first.weights, first.backbone, first.seed) == (None, "resnet18", 0)
    assert (first.schedule.lr, first.schedule.power, first.schedule.iterations) == (0.5, 0.9, 7)
    last = configuration(comparison, runs[-1], flags)
    assert (last.weights, last.backbone, last.seed) == (whole_path("two.pt"), "resnet34", 1)
    assert vars(last)["crop"] == (64, 32)


def test_the_table_has_means_gains_and_the_papers_figures(
    file: Path, tmp_path: Path, done: list[TransferConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(file), "--output", str(out), "--data", "here"]) == 0
    assert len(done) == 8
    assert (out / "comparison.md").read_text().splitlines()[2:6] == [
        "| setting | metric | alone | distilled | distilled gains | paper alone |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a_pspnet | miou | 30.00 ± 7.07 | 42.50 ± 7.07 | +12.50 | 40.0 |",
        "| b_deeplabv3 | miou | 42.50 ± 7.07 | 42.50 ± 7.07 | +0.00 | – |",
    ]
    with (out / "comparison.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert [float(row["miou"]) for row in rows[:4]] == [0.25, 0.35, 0.375, 0.475]
    assert rows[-1]["folder"] == str(out / "b_deeplabv3" / "distilled" / "seed1")
    assert "+12.50" in capsys.readouterr().out


def test_the_table_keeps_the_runs_of_other_settings(
    file: Path, tmp_path: Path, done: list[TransferConfig]
) -> None:
    command = [str(file), "--output", str(tmp_path / "out"), "--data", "here"]
    main([*command, "--settings", "b_*"])
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "a_pspnet" not in text
    main([*command, "--settings", "a_*"])
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "a_pspnet" in text
    assert "b_deeplabv3" in text
    assert len(done) == 8


def complaint(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        compare._run(argv)
    return str(error.value)


WRONG = {
    "another key": ("title", "titles", "titles: unknown key; did you mean 'title'?"),
    "another task": ("task: seg", "task: detection seg", "unknown task 'detection segmentation'"),
    "no title": ("title: Trial", "", "missing 1 required positional argument: 'title'"),
    "another baseline": ("baseline: alone", "baseline: alne", "unknown baseline 'alne'; did you"),
    "a list": (
        "base: {backbone: resnet18}",
        "base: [1]",
        "base: expected keys and values, got [1",
    ),
    "a seed": ("[0, 1]", "[0, x]", "seeds: expected a list of whole numbers, got [0, 'x']"),
    "a folder": ("a_pspnet: {m", "../a: {m", "settings: expected names of letters and digits"),
    "a figure": ("{alone: 40.0}", "{alne: 4}", "unknown backbone of paper.a_pspnet 'alne'"),
    "a setting": ("  a_pspnet: {alone", "  c: {alone", "unknown setting of paper 'c'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_in_the_file_are_named(file: Path, case: str) -> None:
    before, after, expected = WRONG[case]
    assert before in TEXT
    file.write_text(TEXT.replace(before, after))
    assert expected in complaint(str(file), "--data", "here")


def test_mistakes_on_the_command_line_are_named(file: Path) -> None:
    expected = "--settings: nothing fits 'c*' (known: a_pspnet, b_deeplabv3)"
    assert complaint(str(file), "--settings", "c*") == expected
    expected = "--weights: expected NAME:RESNET=PATH, got 'one.pt'"
    assert complaint(str(file), "--weights", "one.pt") == expected
    assert complaint("table6").startswith("unknown comparison 'table6'; did you mean 'table5'?")
    assert "models" in complaint(str(file), "--data", "here", "--models", "x")


def test_a_backbone_without_a_file_is_named_before_anything_is_done(
    file: Path, done: list[TransferConfig]
) -> None:
    file.write_text(TEXT.replace(", resnet34: two.pt", ""))
    assert complaint(str(file), "--data", "here") == (
        "weights: expected a file for distilled and resnet34, which b_deeplabv3 begins with: "
        "--weights distilled:resnet34=PATH, or random in its place"
    )
    assert done == []


def test_a_backbone_may_be_given_on_the_command_line(
    file: Path, tmp_path: Path, done: list[TransferConfig]
) -> None:
    flags = ["--data=here", "--weights=more:resnet18=c.pt", "--weights", "alone:resnet18=d.pt"]
    main([str(file), "--output", str(tmp_path), "--settings=a_pspnet", *flags])
    expected = [whole_path(name) for name in ("d.pt", "one.pt", "c.pt")]
    assert [config.weights for config in done[::2]] == expected
