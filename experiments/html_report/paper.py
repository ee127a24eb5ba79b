"""The paper's Table 6(a) beside the runs of the same algorithms."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.comparison.statistics import Spread
from experiments.comparison.summary import NOTHING, Summary, text_of
from experiments.html_report.naming import Setting

# arXiv 2502.18510, Table 6(a): ShuffleNetV2 on CIFAR-100, mean and standard deviation of three
# runs, in %.
TABLE_6A = {
    "pg": Spread(78.39, 0.14),
    "dpg": Spread(78.16, 0.11),
    "ddpg": Spread(78.05, 0.22),
    "ppo": Spread(78.28, 0.08),
}


@dataclass(frozen=True)
class PaperRow:
    """An algorithm of the paper's table.

    Attributes:
        algo: Its name.
        paper: The published accuracy.
        method: Label of ours.
        setting: Its setting; none of what was not run.
        n: Number of its pools or seeds.
        ours: Its accuracy.
    """

    algo: str
    paper: str
    method: str = NOTHING
    setting: Setting | None = None
    n: int = 0
    ours: str = "not run"


def paper_rows(settings: Sequence[tuple[Setting, Sequence[Summary]]]) -> list[PaperRow]:
    """The rows of Table 6(a); an algorithm with several methods or settings has one for each."""
    rows: list[PaperRow] = []
    for algo, figure in TABLE_6A.items():
        paper = text_of(figure)
        ours = [
            PaperRow(algo, paper, s.method, setting, len(s.values), text_of(s.last, scale=100))
            for setting, summaries in settings
            for s in summaries
            if s.algo == algo
        ]
        rows += ours or [PaperRow(algo, paper)]
    return rows
