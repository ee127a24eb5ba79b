import os
import pty
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from comparisons import make_result
from experiments.config import parse_arguments
from experiments.console import (
    ConsoleProgress,
    console,
    describe_epoch,
    draw_curves,
    print_results,
    result_table,
    teachers_of,
)
from experiments.drawing import drawn
from experiments.experiment import Result, mean_weights
from mtkd_env.vector import StepRecord
from odd_names import ODD_NAMES

TEACHERS = ("resnet8", "wrn_16_1-random")


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles behave as on an ordinary terminal, wherever the tests run."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def row(epoch: int, **changes: Any) -> dict[str, Any]:
    shares = (0.25 + epoch / 100, 0.75 - epoch / 100)
    weights = {
        f"weights/{head}/{name}": share
        for head in ("logit", "feature")
        for name, share in zip(TEACHERS, shares, strict=True)
    }
    losses = {f"loss/{name}": 3 / epoch for name in ("total", "cross_entropy", "kd", "feature")}
    rest = {"lr": 0.1, "test/accuracy": 0.1 * epoch, "score": 0.125}
    return {"epoch": epoch, **losses, **weights, **rest, **changes}


RESULT = make_result(
    teachers={"resnet8": 0.9, "wrn_16_1-random": 0.1},
    weights={"resnet8": 0.7, "wrn_16_1-random": 0.3},
    seconds=12.34,
    folder="runs/digits_pg",
)


def printed(*results: Result) -> str:
    out = StringIO()
    print_results(console(file=out, width=140), results)
    return out.getvalue()


def on_terminal(width: int = 140) -> tuple[Console, StringIO]:
    out = StringIO()
    return console(file=out, force_terminal=True, width=width), out


def off_terminal() -> tuple[Console, StringIO]:
    out = StringIO()
    return console(file=out, width=140), out


def plain(out: StringIO) -> str:
    """What was written, without colours and movements of the cursor."""
    return Text.from_ansi(out.getvalue()).plain


STEP: StepRecord = None  # Nobody looks into it.

(CONFIG,) = parse_arguments(["--algo", "pg", "--seed", "7"])


# An epoch.


def test_an_epoch_is_described_in_one_line() -> None:
    found = describe_epoch(row(3), epochs=30)
    assert re.sub(" +", " ", found) == (
        "epoch 3/30 loss 1.000 CE 1.000 test accuracy 30.00% weights 0.28 0.72 agent score 0.12"
    )
    # Columns stand below each other.
    later = row(30, **{"test/accuracy": 0.9, "score": -0.5})
    assert len(describe_epoch(later, epochs=30)) == len(found)


def test_validation_images_come_before_test_images() -> None:
    found = describe_epoch(row(3, **{"val/accuracy": 0.25}), epochs=30)
    assert "  val accuracy 25.00%  test accuracy 30.00%  " in found


def test_a_score_of_minus_nothing_is_nothing() -> None:
    assert describe_epoch(row(1, score=-0.001), epochs=3).endswith("agent score  0.00")


def test_teachers_and_their_weights_are_read_from_a_row() -> None:
    assert teachers_of(row(1)) == TEACHERS
    changed = row(1, **{"weights/logit/resnet8": 0.5, "weights/feature/resnet8": 0.1})
    assert mean_weights(changed, TEACHERS)["resnet8"] == pytest.approx(0.3)


# Tables.


def test_every_run_has_a_row() -> None:
    for count in (1, 2, 3):
        results = [replace(RESULT, algo=f"algo{i}") for i in range(count)]
        table = result_table(results)
        assert list(table.columns[0].cells) == [result.algo for result in results]
        assert {len(list(column.cells)) for column in table.columns} == {count}


@pytest.mark.parametrize("validation", [{}, {"last": 0.25, "best": 0.5}])
def test_tables_say_what_the_best_epoch_was_chosen_on(validation: dict[str, float]) -> None:
    out = StringIO()
    print_results(Console(file=out, width=200), [replace(RESULT, validation=validation)])
    text = " ".join(out.getvalue().split())
    assert ("25.00% 50.00%" in text) == bool(validation)
    assert ("best: after the epoch that is best on the validation images" in text) == bool(
        validation
    )
    assert ("best: the highest, chosen on test" in text) != bool(validation)


def test_every_teacher_has_a_column_of_weights() -> None:
    headings = [str(column.header) for column in result_table([RESULT]).columns]
    assert [text for text in headings if text.startswith("weight\n")] == [
        f"weight\n{teacher}" for teacher in RESULT.teachers
    ]


def test_the_tables_say_what_the_runs_came_to() -> None:
    other = replace(RESULT, algo="aver", last=0.5, score=-0.0001, folder="runs/other")
    text = printed(RESULT, other)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    weights = [f"{weight:.3f}" for weight in RESULT.weights.values()]
    assert lines["pg"][1:] == ["81.25%", "87.50%", "0.500", *weights, "12.3"]
    assert lines["aver"][1:] == ["50.00%", "87.50%", "0.000", *weights, "12.3"]
    assert lines["resnet8"] == ["resnet8", "90.00%"]
    assert "pg: runs/digits_pg" in text
    assert "aver: runs/other" in text


def test_odd_names_are_printed_as_they_are() -> None:
    names = [name.partition("\n")[0] for name in ODD_NAMES]
    odd = replace(RESULT, teachers=dict.fromkeys(names, 0.9), weights=dict.fromkeys(names, 0.1))
    results = [replace(odd, algo=name, folder=name) for name in names]
    out_console, out = on_terminal(width=3000)
    print_results(out_console, results)
    lines = plain(out).splitlines()
    assert set(names) <= {line.split()[0] for line in lines if line.split()}
    assert {f"{name}: {name}" for name in names} <= set(lines)


def test_odd_names_are_shown_in_live_bars() -> None:
    for name in ODD_NAMES:
        out_console, out = on_terminal(width=600)
        progress = ConsoleProgress(out_console)
        progress.teacher(name, 1, 1, 0.5)
        with progress.training(replace(CONFIG, algo=name), 1):
            progress.step(STEP)
        assert plain(out).count(name.partition("\n")[0]) >= 2


def test_the_tables_of_two_methods_fit_a_narrow_terminal() -> None:
    four = ("resnet8", "resnet14", "resnet20", "wrn_16_1")
    wide = replace(RESULT, teachers=dict.fromkeys(four, 0.9), weights=dict.fromkeys(four, 0.25))
    narrow, out = on_terminal(width=80)
    print_results(narrow, [wide, replace(wide, algo="aver")])
    assert "…" not in out.getvalue()


# Pictures.


@pytest.mark.parametrize("epochs", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_pictures")
def test_curves_are_drawn(epochs: int, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves([row(epoch) for epoch in range(1, epochs + 1)], path, "pg on digits")
    image = matplotlib.image.imread(path)
    height, width, _ = image.shape
    assert height > 300
    assert width > 1000
    colours = np.unique((image[..., :3].reshape(-1, 3) * 255).astype(int), axis=0)
    assert len(colours) > 20
    # Something is drawn in each of the three panels.
    for panel in np.array_split(image[..., :3], 3, axis=1):
        assert 0.01 < (panel < 0.99).any(-1).mean() < 0.5
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("_pictures")
def test_odd_names_are_drawn_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Figure] = []
    save = FigureCanvasAgg.print_png

    def kept(canvas: FigureCanvasAgg, *arguments: Any, **options: Any) -> None:
        figures.append(canvas.figure)
        save(canvas, *arguments, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", kept)
    shares = {f"weights/{head}/{n}": 0.1 for head in ("logit", "feature") for n in ODD_NAMES}
    plain_row = {k: v for k, v in row(1).items() if not k.startswith("weights/")}
    draw_curves([plain_row | shares], tmp_path / "curves.png", "".join(ODD_NAMES))
    legend = figures[0].axes[2].get_legend()
    assert legend is not None
    shown = [text.get_text().strip() for text in legend.get_texts()]
    assert shown == [*(drawn(name).strip() for name in ODD_NAMES), "uniform"]
    # No name leaves the panels less room than they need.
    assert all(axes.get_position().size.min() > 0.2 for axes in figures[0].axes)


@pytest.mark.parametrize("splits", [["test"], ["val", "test"]], ids=str)
def test_curves_show_every_split_that_was_evaluated(
    splits: list[str], figures: list[Figure], tmp_path: Path
) -> None:
    extra = {f"{split}/accuracy": 0.5 for split in splits}
    draw_curves([row(1, **extra), row(2, **extra)], tmp_path / "curves.png", "title")
    (figure,) = figures
    labels = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert labels == [
        splits,
        ["total", "cross entropy", "kd", "feature"],
        [*TEACHERS, "uniform"],
    ]


# Progress.


def test_off_a_terminal_a_teacher_long_in_training_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("experiments.console.time", SimpleNamespace(monotonic=lambda: now))
    out_console, out = off_terminal()
    progress = ConsoleProgress(out_console)
    for epoch, now in enumerate((59.0, 60.0, 119.0, 120.0), start=1):  # noqa: B007 - read above
        progress.teacher("resnet8", epoch, 9, 0.5)
    assert out.getvalue().splitlines() == [
        "teacher resnet8: epoch 2/9, loss 0.500",
        "teacher resnet8: epoch 4/9, loss 0.500",
    ]


def test_off_a_terminal_every_epoch_is_a_line() -> None:
    out_console, out = off_terminal()
    progress = ConsoleProgress(out_console)
    for epoch in (1, 2):
        progress.teacher("resnet8", epoch, 2, 0.5)
    with progress.training(CONFIG, steps=6):
        for epoch in (1, 2):
            for _ in range(3):
                progress.step(STEP)
            progress.epoch(row(epoch), 2)
    progress.close()
    assert out.getvalue().splitlines() == [
        "trained teacher resnet8: 2 epochs, loss 0.500",
        "pg: 6 steps, seed 7",
        describe_epoch(row(1), 2),
        describe_epoch(row(2), 2),
    ]


def test_on_a_terminal_a_bar_shows_the_steps() -> None:
    out_console, out = on_terminal()
    progress = ConsoleProgress(out_console)
    with progress.training(CONFIG, steps=6):
        for epoch in (1, 2):
            for _ in range(3):
                progress.step(STEP)
            progress.epoch(row(epoch), 2)
    text = plain(out)
    assert describe_epoch(row(2), 2) in text
    assert "6/6" in text
    assert "\x1b[?25l" in out.getvalue()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_on_a_terminal_every_teacher_has_a_bar() -> None:
    out_console, out = on_terminal()
    progress = ConsoleProgress(out_console)
    for name in TEACHERS:
        for epoch in (1, 2):
            progress.teacher(name, epoch, 2, 0.25)
    text = plain(out)
    for name in TEACHERS:
        assert f"teacher {name}" in text
    assert text.count("2/2") >= 2
    assert "loss 0.250" in text


def test_the_cursor_comes_back_after_an_interruption() -> None:
    out_console, out = on_terminal()
    progress = ConsoleProgress(out_console)
    progress.teacher("resnet8", 1, 3, 0.5)
    progress.close()
    assert out.getvalue().endswith("\x1b[?25h")
    out_console, out = on_terminal()
    progress = ConsoleProgress(out_console)
    with pytest.raises(KeyboardInterrupt), progress.training(CONFIG, steps=6):
        raise KeyboardInterrupt
    assert out.getvalue().endswith("\x1b[?25h")
    # Without a bar a step is nothing to show.
    progress.step(STEP)


def test_pages_are_wide_enough_for_a_line_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console().width == 140
    main, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert console().is_terminal
    os.close(main)
