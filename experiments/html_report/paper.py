"""The paper's Table 6(a) beside the runs of the same algorithms."""

from collections.abc import Sequence

from experiments.comparison.statistics import Spread
from experiments.comparison.summary import NOTHING, Summary, text_of
from experiments.html_report.naming import Setting
from experiments.html_report.table import PageTable

# arXiv 2502.18510, Table 6(a): ShuffleNetV2 on CIFAR-100, mean and standard deviation of three
# runs, in %.
TABLE_6A = {
    "pg": Spread(78.39, 0.14),
    "dpg": Spread(78.16, 0.11),
    "ddpg": Spread(78.05, 0.22),
    "ppo": Spread(78.28, 0.08),
}


def paper_rows(settings: Sequence[tuple[Setting, Sequence[Summary]]]) -> list[list[str]]:
    """The rows of Table 6(a); an algorithm with several methods or settings has one for each.

    Algorithm, the paper's accuracy, ours, over how many pools or seeds, our method and setting.
    """
    rows: list[list[str]] = []
    for algo, figure in TABLE_6A.items():
        paper = [algo, text_of(figure)]
        ours = [
            [text_of(s.last, scale=100), str(len(s.values)), s.method, setting.heading or NOTHING]
            for setting, summaries in settings
            for s in summaries
            if s.algo == algo
        ]
        rows += [paper + one for one in ours or [["not run", NOTHING, NOTHING, NOTHING]]]
    return rows


def paper_table(settings: Sequence[tuple[Setting, Sequence[Summary]]]) -> PageTable | None:
    """The table; none if none of its algorithms was run."""
    headings = ["algorithm", "paper [%]", "ours [%]", "n", "our method", "setting"]
    run = any(s.algo in TABLE_6A for _, summaries in settings for s in summaries)
    return PageTable(headings, paper_rows(settings)) if run else None
