"""Scores over all settings of a comparison: 0 is the baseline, 1 the ceiling."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

from comparisons import make_result
from experiments.comparison.distillation import Distillation
from experiments.comparison.normalised import score_lines
from experiments.comparison.plan import Comparison
from experiments.comparison.report import markdown, print_comparison, summaries_of
from experiments.console import console
from experiments.running.result import RunResult

COMPARISON = Comparison(
    title="Trial",
    kind=Distillation(),
    baseline="aver",
    methods=["aver", "pg", "gate"],
    settings=["skewed", "even"],
    runs=[],
    ceiling="gate",
)

# Accuracy by setting and method, over which each pool adds a little.
ACCURACIES = {
    "skewed": {"aver": 0.4, "pg": 0.5, "gate": 0.6},
    "even": {"aver": 0.7, "pg": 0.69, "gate": 0.701},
}


def finished() -> list[RunResult]:
    return [
        make_result(method=method, setting=setting, last=value + pool / 100, seed=pool, pool=pool)
        for setting, methods in ACCURACIES.items()
        for method, value in methods.items()
        for pool in (1, 2, 3)
    ]


def test_the_baseline_is_0_the_ceiling_1_and_where_nothing_can_be_won_does_not_count() -> None:
    _, *scores = score_lines(COMPARISON, summaries_of(COMPARISON, finished()))
    assert scores == [
        ["gate", "1.00", "[1.00, 1.00]", "1", "3"],
        ["pg", "0.50", "[0.50, 0.50]", "1", "3"],
        ["aver", "0.00", "[0.00, 0.00]", "1", "3"],
    ]


def test_without_a_ceiling_there_are_no_scores() -> None:
    without = replace(COMPARISON, ceiling=None)
    assert score_lines(without, summaries_of(without, finished())) == []


def test_scores_are_printed_and_written() -> None:
    out = StringIO()
    print_comparison(console(file=out, width=200), COMPARISON, finished(), Path("runs"))
    text = markdown(COMPARISON, summaries_of(COMPARISON, finished()))
    assert "| pg | 0.50 | [0.50, 0.50] | 1 | 3 |" in text
    for shown in (out.getvalue(), text):
        assert "Over all settings" in shown
        assert "aver is 0 and gate 1" in shown
