"""The paper's Table 6(a) beside the runs of the same algorithms."""

from collections.abc import Sequence

from experiments.comparison.statistics import Spread
from experiments.comparison.summary import NOTHING, text_of
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


def paper_table(settings: Sequence[Setting]) -> PageTable | None:
    """A row for each algorithm, method and setting; none if none of its algorithms was run."""
    headings = ["algorithm", "paper [%]", "ours [%]", "n", "our method", "setting"]
    rows: list[list[str]] = []
    for algo, figure in TABLE_6A.items():
        ours = [
            [text_of(s.last, scale=100), str(len(s.values)), s.method, setting.heading or NOTHING]
            for setting in settings
            for s in setting.summaries
            if s.algo == algo
        ]
        missing = [["not run", NOTHING, NOTHING, NOTHING]]
        rows += [[algo, text_of(figure), *one] for one in ours or missing]
    run = any(s.algo in TABLE_6A for setting in settings for s in setting.summaries)
    return PageTable(headings, rows) if run else None
