"""Comparisons of detectors and segmenters, by the one program for all comparisons."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments import compare
from experiments.comparison.plan import (
    FOLDERS,
    Comparison,
    Selection,
    find_file,
    load_comparison,
)
from experiments.report import write_report
from experiments.transfer.program import TaskResult, TransferConfig
from experiments.transfer.training import TaskRun
from mtkd_env import ConfigError
from mtkd_env.files import whole_path
from tasks import Inline

TEXT = """
title: Trial
kind: segmentation
baseline: alone
base: {backbone: resnet18}
settings:
  a_pspnet: {model: pspnet, recipe: ade20k, schedule: {lr: 0.5}}
  b_deeplabv3: {model: deeplabv3, backbone: resnet34, crop: [64, 32]}
methods:
  alone: {resnet18: random, resnet34: random}
  distilled: {resnet18: one.pt, resnet34: two.pt}
seeds: [0, 1]
paper:
  alone: {a_pspnet: 40.0}
"""

EVERYTHING = Selection()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one.pt", "two.pt", "c.pt", "d.pt"):
        (tmp_path / name).touch()
    path = tmp_path / "trial.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[TransferConfig]:
    """The configurations of the runs that are done, in place of the runs."""
    configs: list[TransferConfig] = []

    def complete(run: TaskRun[Any], folder: Path, *, resume: bool) -> TaskResult:
        assert resume
        config = run.config
        configs.append(config)
        folder.mkdir(parents=True, exist_ok=True)
        row = {"step": 3, "epoch": 1.5, "val/miou": 0.25}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "config.yaml").write_text(config.to_yaml())
        if config.schedule.lr > 1000:
            raise FloatingPointError("loss/total became NaN")
        metrics = {"miou": 0.25 + 0.125 * bool(config.weights) + 0.1 * config.seed, "other": 1.0}
        result = make_task_result(config, metrics, folder)
        (folder / "result.json").write_text(json.dumps(asdict(result)))
        return result

    monkeypatch.setattr(TaskRun, "complete", complete)
    monkeypatch.setattr(compare, "LocalExecutor", Inline)
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


def load(file: Path, *flags: str, weights: tuple[str, ...] = ()) -> Comparison:
    return load_comparison(file, flags, EVERYTHING, file.parent / "out", weights)


@pytest.mark.parametrize("path", sorted(FOLDERS[1].glob("*.yaml")), ids=lambda path: path.stem)
def test_every_setting_of_a_shipped_table_is_a_run(path: Path) -> None:
    names = ("resnet18", "resnet34", "resnet50")
    methods = ("baseline", "mtkd_rl")
    given = tuple(f"{name}:{net}={name}_{net}.pt" for name in methods for net in names)
    comparison = load(find_file(path.stem), "--data", "nowhere", weights=given)
    assert len(comparison.runs) == len(comparison.settings) * len(methods)
    for run in comparison.runs:
        assert run.config.weights == whole_path(f"{run.method}_{run.config.backbone}.pt")
        assert (run.config.output, run.config.label) == (str(run.folder), run.method)


def test_settings_are_laid_over_their_recipe_and_flags_over_both(file: Path) -> None:
    runs = load(file, "--data=here", "--schedule.iterations=7").runs
    assert [(run.config.seed, run.setting[0], run.method) for run in runs] == [
        (seed, setting, method)
        for seed in (0, 1)
        for setting in "ab"
        for method in ("alone", "distilled")
    ]
    first, last = runs[0].config, runs[-1].config
    assert (first.weights, first.backbone, first.seed) == (None, "resnet18", 0)
    assert (first.schedule.lr, first.schedule.power, first.schedule.iterations) == (0.5, 0.9, 7)
    assert (last.weights, last.backbone, last.seed) == (whole_path("two.pt"), "resnet34", 1)
    assert last.crop == (64, 32)
    assert len({run.folder for run in runs}) == len(runs)


def test_the_table_has_means_differences_and_the_papers_figures(
    file: Path, tmp_path: Path, done: list[TransferConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare.main([str(file), "--output", str(out), "--data", str(tmp_path)]) == 0
    assert len(done) == 8
    lines = (out / "comparison.md").read_text().splitlines()
    assert lines[2:8] == [
        "## a_pspnet",
        "",
        "| method | n seeds | miou last [%] | 95 % interval | miou best [%] | − alone | p (Holm) "
        "| seconds / alone | paper |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| alone | 2 | 30.00 ± 7.07 | [-33.53, 93.53] | 30.00 ± 7.07 | – | – | 1.00 | 40.00 |",
        "| distilled | 2 | 42.50 ± 7.07 | [-21.03, 106.03] | 42.50 ± 7.07 | +12.50 | – | 1.00 "
        "| – |",
    ]
    with (out / "runs.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert [float(row["miou"]) for row in rows[:4]] == [0.25, 0.375, 0.25, 0.375]
    assert {row["metric"] for row in rows} == {"miou"}
    assert "+12.50" in capsys.readouterr().out
    # Nothing is left to do.
    assert compare.main([str(file), "--output", str(out), "--data", str(tmp_path)]) == 0
    assert len(done) == 8


def test_the_page_shows_them_as_the_tables_do(
    file: Path, tmp_path: Path, done: list[TransferConfig]
) -> None:
    out = tmp_path / "out"
    compare.main([str(file), "--output", str(out), "--data", str(tmp_path)])
    assert len(write_report(out, tmp_path / "page.html").runs) == len(done) == 8
    page = (tmp_path / "page.html").read_text()
    for text in (
        "<h1>Trial</h1>",
        "A · a_pspnet</a>: distilled reaches 42.50 % miou: 12.50 points ahead of alone (no "
        "interval), n = 2 seeds.",
        "<span>backbone: resnet34</span> <span>schedule.lr: 0.02</span> <span>model: deeplabv3<",
        "<td>+12.50</td>",
        "miou [%]",
        "At the end: alone 25, distilled 25.",
    ):
        assert text in page


def test_the_tables_keep_the_runs_of_other_settings(
    file: Path, tmp_path: Path, done: list[TransferConfig]
) -> None:
    command = [str(file), "--output", str(tmp_path / "out"), "--data", str(tmp_path)]
    compare.main([*command, "--settings", "b_*"])
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "a_pspnet" not in text
    compare.main([*command, "--settings", "a_*"])
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "a_pspnet" in text
    assert "b_deeplabv3" in text
    assert len(done) == 8


def test_a_run_that_fails_leaves_its_reason_and_the_others_go_on(
    file: Path, tmp_path: Path, done: list[TransferConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(TEXT.replace("lr: 0.5", "lr: 5000"))
    command = [str(file), "--output", str(tmp_path / "out"), "--data", str(tmp_path)]
    assert compare.main([*command, "--jobs", "2"]) == 1
    assert len(done) == 8
    assert capsys.readouterr().err.count("failed: ") == 4
    errors = list((tmp_path / "out" / "runs").glob("*/error.txt"))
    assert len(errors) == 4
    assert errors[0].read_text().startswith("loss/total became NaN\n")
    assert compare.main([*command, "--status"]) == 0
    shown = capsys.readouterr().out
    assert "8 runs: 4 done, 0 running, 4 failed, 0 waiting" in shown
    assert "step 3/80000" in shown.replace("\n", " ")


def complaint(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        compare.main.__wrapped__(argv)
    return str(error.value)


WRONG = {
    "another kind": ("kind: seg", "kind: detection seg", "unknown kind 'detection segmentation'"),
    "weights": (
        "{model: pspnet",
        "{weights: x.pt",
        "a_pspnet.weights: cannot be given here; see m",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_in_the_file_are_named(file: Path, case: str) -> None:
    before, after, expected = WRONG[case]
    assert before in TEXT
    file.write_text(TEXT.replace(before, after))
    assert expected in complaint(str(file), "--data", "here")


def test_mistakes_on_the_command_line_are_named(file: Path, tmp_path: Path) -> None:
    data = ["--data", str(tmp_path)]
    assert "unknown setting 'c*' (known: a_ps" in complaint(str(file), *data, "--settings", "c*")
    expected = "--weights: expected METHOD:RESNET=PATH, got 'one.pt'"
    assert complaint(str(file), *data, "--weights", "one.pt") == expected
    assert complaint("table4b").startswith("unknown comparison 'table4b'; did you mean 'table4'?")
    assert "models" in complaint(str(file), *data, "--models", "x")
    assert complaint(str(file), "--data", "nowhere").startswith("data: no such folder: ")
    (tmp_path / "two.pt").unlink()
    assert complaint(str(file), *data).startswith("--weights: no such file: ")
    assert "means nothing for the runs of" in complaint("table1", "--weights", "a:b=c")


def test_a_backbone_without_a_file_is_named_before_anything_is_done(
    file: Path, done: list[TransferConfig]
) -> None:
    file.write_text(TEXT.replace(", resnet34: two.pt", ""))
    assert complaint(str(file), "--data", "here") == (
        f"{file}: methods.distilled: expected a file for resnet34, which b_deeplabv3 begins with: "
        "--weights distilled:resnet34=PATH, or random in its place"
    )
    assert done == []


def test_a_backbone_may_be_given_on_the_command_line(
    file: Path, tmp_path: Path, done: list[TransferConfig]
) -> None:
    flags = [
        f"--data={tmp_path}",
        "--weights=more:resnet18=c.pt",
        "--weights",
        "alone:resnet18=d.pt",
    ]
    compare.main([str(file), "--output", str(tmp_path / "o"), "--settings=a_pspnet", *flags])
    given = [config.weights for config in done[:3]]
    assert given == [whole_path(name) for name in ("d.pt", "one.pt", "c.pt")]
