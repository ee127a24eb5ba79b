import csv
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from comparisons import TEACHERS, make_result
from experiments.comparison.distillation import Distillation
from experiments.comparison.plan import UNNAMED, Comparison
from experiments.comparison.report import (
    Finished,
    draw_comparison,
    markdown,
    print_comparison,
    summaries_of,
    write_comparison,
)
from experiments.comparison.statistics import Spread, paired_difference, t_interval
from experiments.console import console
from odd_names import ODD_NAMES

# Accuracy after the last epoch, by method and seed.
ACCURACIES = {"aver": {0: 0.5, 1: 0.625, 2: 0.75}, "pg": {0: 0.75, 1: 0.75}}

COMPARISON = Comparison(
    title="Trial",
    kind=Distillation(),
    baseline="aver",
    methods=["pg", "aver", "none"],
    settings=[UNNAMED],
    runs=[],
    paper={("pg", UNNAMED): Spread(78.39, 0.14), ("aver", UNNAMED): Spread(76.83, None)},
    paper_title="paper (elsewhere)",
)


def finished(setting: str = UNNAMED) -> Finished:
    """Runs with three seeds of one method and two of another; those take half the time."""
    found = []
    for method, accuracies in ACCURACIES.items():
        for seed, accuracy in accuracies.items():
            seconds = 10.0 * (seed + 1) * (1 if method == "aver" else 0.5)
            result = make_result(
                method=method, setting=setting, last=accuracy, seed=seed, seconds=seconds
            )
            found.append(result)
    return found


def printed(width: int, comparison: Comparison = COMPARISON, runs: Finished | None = None) -> str:
    out = StringIO()
    runs = finished() if runs is None else runs
    print_comparison(console(file=out, width=width), comparison, runs, Path("runs/trial"))
    return out.getvalue()


# Numbers.


def test_methods_are_summarised_in_the_order_of_the_file() -> None:
    assert [summary.method for summary in summaries_of(COMPARISON, finished())] == ["pg", "aver"]


def test_a_summary_is_that_of_the_seeds() -> None:
    pg, aver = summaries_of(COMPARISON, finished())
    assert aver.values == [0.5, 0.625, 0.75]
    assert aver.last == Spread(0.625, 0.125)
    assert aver.interval == t_interval([0.5, 0.625, 0.75])
    assert aver.best == Spread(0.875, 0)
    assert aver.difference is None
    assert aver.seconds == Spread(20, 10)
    assert aver.slowness == 1
    # The third seed has no partner.
    assert pg.difference == paired_difference(
        {(0, 0): 0.25, (0, 1): 0.125}, {(0, 0): 0.0, (0, 1): 0.0}
    )
    assert pg.slowness == 0.5
    assert pg.score == Spread(0.5, 0)
    assert pg.weights == {"resnet8": 0.75, "wrn_16_1": 0.25}
    assert (pg.paper, aver.paper) == (Spread(78.39, 0.14), Spread(76.83, None))


def test_without_the_baselines_runs_there_is_no_difference() -> None:
    only = [result for result in finished() if result.method == "pg"]
    for comparison in (COMPARISON, replace(COMPARISON, baseline=None)):
        (summary,) = summaries_of(comparison, only)
        assert summary.difference is None
        assert summary.slowness is None


def test_settings_are_summarised_apart() -> None:
    comparison = replace(COMPARISON, settings=["near", "far"])
    runs = [*finished("far"), *finished("near")]
    found = [(summary.setting, summary.method) for summary in summaries_of(comparison, runs)]
    assert found == [("near", "pg"), ("near", "aver"), ("far", "pg"), ("far", "aver")]


# Tables.


def test_the_table_says_what_the_methods_came_to() -> None:
    text = printed(200)
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert re.split("  +", lines["pg"].strip()) == [
        "pg",
        "2",
        "75.00 ± 0.00",
        "–",
        "87.50 ± 0.00",
        "+18.75 [-60.66, +98.16]",
        "0.205",
        "0.500",
        "0.750",
        "0.250",
        "0.50",
        "78.39 ± 0.14",
    ]
    assert re.split("  +", lines["aver"].strip())[3:] == [
        *("[31.45, 93.55]", "87.50 ± 0.00", "–", "–", "0.500", "0.750", "0.250", "1.00", "76.83")
    ]
    assert "chosen on the same images" in text
    assert "kept in runs/trial" in text


def test_a_single_seed_has_neither_spread_nor_interval() -> None:
    text = printed(200, runs=[result for result in finished() if result.seed == 0])
    line = next(line for line in text.splitlines() if line.startswith(" pg"))
    assert re.split("  +", line.strip())[:6] == [*("pg", "1", "75.00", "–", "87.50", "+25.00")]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (165, {"weight", "seconds", "score", "last"}),
        (130, {"seconds", "score", "last"}),
        (95, {"score", "last"}),
        (80, {"last"}),
    ],
)
def test_a_narrow_terminal_shows_what_matters_most(width: int, shown: set[str]) -> None:
    text = printed(width)
    head = text.split("─")[0]
    assert {word for word in ("weight", "seconds", "score", "last") if word in head} == shown
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_without_a_baseline_the_table_shows_seconds() -> None:
    text = printed(200, replace(COMPARISON, baseline=None, paper={}))
    head = text.split("─")[0]
    assert "seconds" in head
    assert "aver" not in head
    assert "paper" not in head


def behind(setting: str = UNNAMED) -> Finished:
    """A method that is certainly behind the baseline, and one that may be."""
    accuracies = {"aver": (0.5, 0.625, 0.75), "pg": (0.375, 0.51, 0.62), "none": (0.4, 0.5, 0.7)}
    return [
        make_result(method=method, setting=setting, seed=seed, last=last)
        for method, values in accuracies.items()
        for seed, last in enumerate(values)
    ]


def test_what_holms_correction_leaves_of_all_differences_is_bold() -> None:
    comparison = replace(COMPARISON, settings=["near", "far"])
    one, two = (
        summaries_of(comparison, [r for s in settings for r in behind(s)])
        for settings in (["near"], ["near", "far"])
    )
    p = {s.method: s.difference.p for s in one if s.difference and s.difference.p}
    assert (p["pg"], p["none"]) == (
        pytest.approx(0.0013, abs=1e-4),
        pytest.approx(0.0533, abs=1e-4),
    )
    # 2 × pg, 1 × none; and of four, 4 × pg and 2 × none.
    assert {s.method: s.adjusted_p for s in one} == {
        "pg": pytest.approx(2 * p["pg"]),
        "none": p["none"],
        "aver": None,
    }
    assert [s.adjusted_p for s in two if s.method == "pg"] == pytest.approx([4 * p["pg"]] * 2)
    text = markdown(comparison, one)
    assert "| **-12.33 [-14.23, -10.44]** | 0.003 |" in text
    assert text.count("**") == 2
    assert "Holm's correction" in text
    out = StringIO()
    print_comparison(
        console(file=out, width=200, force_terminal=True), comparison, behind("near"), Path("runs")
    )
    assert "\x1b[1m-12.33 [-14.23, -10.44]\x1b[0m" in out.getvalue()


def test_a_difference_of_fewer_pairs_than_runs_says_so() -> None:
    runs = [r for r in behind() if (r.method, r.seed) != ("aver", 2)]
    text = markdown(COMPARISON, summaries_of(COMPARISON, runs))
    assert text.count("(n = 2)") == 2


def of_pools() -> Finished:
    """Two students of each of three pools; the last is ahead of the baseline by less."""
    return [
        make_result(method=method, pool=pool, seed=seed, last=0.5 + pool / 8 + seed / 32 + ahead)
        for method, gains in {"aver": (0, 0, 0), "pg": (0.125, 0.125, 0.0625)}.items()
        for pool, ahead in enumerate(gains)
        for seed in range(2)
    ]


def test_over_pools_n_is_their_number() -> None:
    pg, aver = summaries_of(COMPARISON, of_pools())
    assert aver.varying == "pools"
    assert aver.values == [0.515625, 0.640625, 0.765625]
    assert aver.interval == t_interval(aver.values)
    assert pg.difference is not None
    assert (pg.difference.mean, len(pg.difference.values)) == (pytest.approx(0.3125 / 3), 3)
    assert pg.difference.interval == t_interval([0.125, 0.125, 0.0625])


def test_tables_say_that_pools_vary(tmp_path: Path) -> None:
    write_comparison(COMPARISON, of_pools(), tmp_path)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "| method | n pools | test accuracy last [%] |" in text
    assert "standard deviation over the n pools" in text
    assert "paired by pool and seed, each pool the mean of its seeds" in text
    row = read(tmp_path / "comparison.csv")[0]
    assert (row["n"], row["varying"]) == ("3", "pools")
    runs = [(row["pool"], row["seed"]) for row in read(tmp_path / "runs.csv")]
    assert sorted(runs[:6]) == [(str(pool), str(seed)) for pool in range(3) for seed in range(2)]


def test_markdown_holds_a_table_for_every_setting() -> None:
    comparison = replace(COMPARISON, settings=["near", "far"])
    text = markdown(comparison, summaries_of(comparison, [*finished("near"), *finished("far")]))
    assert text.startswith("# Trial\n\n## near\n\n| method | n seeds | test accuracy last [%] |")
    assert text.count("| pg | 2 | 75.00 ± 0.00 |") == 2
    assert "\n\n## far\n\n" in text
    assert "| paper (elsewhere) |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


# Files.


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(path.read_text(encoding="utf-8"))))


def test_files_hold_everything_in_full_precision(tmp_path: Path) -> None:
    third = [
        replace(result, last=result.last / 3, weights={"other": 1.0})
        if result.method == "pg"
        else result
        for result in finished()
    ]
    write_comparison(COMPARISON, third, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"comparison.csv", "comparison.md", "comparison.png", "runs.csv"}
    pg, aver = read(tmp_path / "comparison.csv")
    assert (pg["method"], pg["n"], float(pg["last_mean"])) == ("pg", "2", 0.25)
    assert float(pg["difference_mean"]) == -0.3125
    assert [float(pg[f"difference_{end}"]) for end in ("low", "high")] == pytest.approx(
        [-1.1066, 0.4816], abs=1e-4
    )
    assert (float(pg["paper_mean"]), float(pg["paper_std"])) == (78.39, 0.14)
    assert float(pg["seconds_ratio"]) == 0.5
    assert (pg["weight_other"], pg["weight_resnet8"]) == ("1.0", "")
    assert (aver["difference_mean"], aver["paper_std"]) == ("", "")
    assert float(aver["last_std"]) == 0.125
    runs = read(tmp_path / "runs.csv")
    assert [(row["method"], row["seed"]) for row in runs] == [
        (result.method, str(result.seed)) for result in third
    ]
    assert [float(row["last"]) for row in runs] == [result.last for result in third]


# The picture.


def test_every_seed_is_a_dot_and_the_baseline_a_line(figures: list[Figure], tmp_path: Path) -> None:
    comparison = replace(COMPARISON, settings=["near", "far"])
    runs = [*finished("near"), *finished("far")]
    draw_comparison(comparison, summaries_of(comparison, runs), tmp_path / "picture.png")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes[:2]] == ["near", "far"]
    for axes in figure.axes[:2]:
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["pg", "aver"]
        dots = {
            tuple(line.get_xdata()): list(line.get_ydata())
            for line in axes.lines
            if line.get_marker() == "o"
        }
        assert dots == {(75, 75): [0, 0], (50, 62.5, 75): [1, 1, 1]}
        dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert dotted == [62.5]
    for axes in figure.axes[2:]:
        assert axes.get_xlabel() == "− aver [points]"
        found = {line.get_marker(): list(line.get_xdata()) for line in axes.lines[:2]}
        interval = t_interval([0.25, 0.125]) or ()
        assert found == {"None": [100 * end for end in interval], "D": [18.75]}
        assert {line.get_color() for line in axes.lines[:2]} == {"black"}


def test_what_is_certain_is_red_in_the_picture(figures: list[Figure], tmp_path: Path) -> None:
    draw_comparison(COMPARISON, summaries_of(COMPARISON, behind()), tmp_path / "picture.png")
    (figure,) = figures
    colours = {
        line.get_ydata()[0]: line.get_color()
        for line in figure.axes[1].lines
        if line.get_marker() == "D"
    }
    # pg, and none, which is in the third row.
    assert colours == {0: "tab:red", 2: "black"}


@pytest.mark.usefixtures("_pictures")
def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    draw_comparison(COMPARISON, summaries_of(COMPARISON, finished()), path)
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 150
    assert 0.005 < (image[..., :3] < 0.99).any(-1).mean() < 0.5
    assert list(tmp_path.iterdir()) == [path]


# Names.


def test_odd_names_are_text_in_every_medium(tmp_path: Path) -> None:
    names = list(ODD_NAMES)
    comparison = replace(COMPARISON, title=names[0], methods=names, settings=names, baseline="[/]")
    weights = dict.fromkeys(names, 0.1)
    runs = [make_result(method=name, setting=name, weights=weights) for name in names]
    write_comparison(comparison, runs, tmp_path)
    assert {row["method"] for row in read(tmp_path / "comparison.csv")} == set(names)
    lines = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1].strip() for line in lines if line.startswith("|")]
    assert {name.replace("\n", " ").replace("|", r"\|") for name in names} <= set(cells)
    text = printed(2000, comparison, runs)
    assert all(f" {line} " in text for name in names for line in name.splitlines())


def test_teachers_of_the_results_are_those_of_the_tests() -> None:
    assert tuple(make_result().weights) == TEACHERS
