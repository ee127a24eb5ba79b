"""The sections of the page: what each of them shows, and why it may have nothing to show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from experiments.html_report import breakdown, curves
from experiments.html_report.exhibits import make_exhibit
from experiments.html_report.naming import Group, Setting
from experiments.html_report.style import GUIDE_COLOUR, Key, Palette, Picture, inline
from experiments.html_report.table import PageTable, configurations, paper_table, version_table

HEAD_KEYS = (Key("logit head", "#222222"), Key("feature head", "#222222", "dashed"))
UNIFORM_KEY = Key("equal weights", GUIDE_COLOUR, "dotted")
RIGHT_KEYS = tuple(
    Key(f"{head} head, teacher {kind}", "#222222", symbol)
    for head, (_, *both) in breakdown.SYMBOLS.items()
    for kind, symbol in zip(("right", "wrong"), both, strict=True)
)
PART_KEYS = tuple(Key(part, colour) for part, colour in curves.PART_COLOURS.items())


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page.

    Attributes:
        anchor: Its name in links.
        title: Its heading.
        intro: What it shows.
        template: The file that shows it.
        content: What the file is given; nothing where there is nothing to show.
        missing: Why there may be nothing to show; of methods with equal weights nothing needs to be
            said.
        is_open: Whether it is shown before anybody asks for it.
    """

    anchor: str
    title: str
    intro: str
    template: str = "pictures.html"
    content: Any = None
    missing: str = ""
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart(Section):
    """A section with one picture for every setting.

    Attributes:
        about: What a picture shows, for those who cannot see it.
        draw: Draws the methods of a setting.
        keep: Whether there is something to draw of a method; by default of every one.
        numbers: The numbers that a picture ends with, for those who cannot see it.
        legend: What colours and marks mean that are no method's.
        names_teachers: Whether the teachers' colours belong to the legend.
        is_wide: Whether a picture takes the whole width of a page.
        table: The numbers of a picture.
    """

    about: str
    draw: Callable[[Sequence[Group], Palette], Figure]
    keep: Callable[[Group], bool] = bool
    numbers: Callable[[Sequence[Group]], str] | None = None
    legend: Sequence[Key] = ()
    names_teachers: bool = False
    is_wide: bool = True
    table: Callable[[Sequence[Group]], PageTable] | None = None

    def section(self, settings: Sequence[Setting], palette: Palette) -> Section:
        """The section, with the pictures of all settings that there is something to draw of."""
        pictures = [
            self._picture(setting, kept, palette)
            for setting in settings
            if (kept := [group for group in setting.groups if self.keep(group)])
        ]
        teachers = palette.teachers.items() if self.names_teachers else ()
        legend = [*(Key(name, colour) for name, colour in teachers), *self.legend]
        content = {"pictures": pictures, "legend": legend, "wide": self.is_wide}
        if self.table:
            content["tables"] = [(each, self.table(each.groups)) for each in settings]
        return replace(self, content=content if pictures else None)

    def _picture(self, setting: Setting, kept: Sequence[Group], palette: Palette) -> Picture:
        numbers = self.numbers(kept) if self.numbers else ""
        end = f" At the end: {numbers}." if numbers else ""
        about = " – ".join(filter(None, (self.about, setting.heading)))
        figure = self.draw(kept, palette)
        svg = inline(figure, f"{self.anchor}-{setting.letter}", f"{about}.{end}")
        left_out = ", ".join(group.method for group in setting.groups if group not in kept)
        note = f"Not in it: {left_out} ({self.missing})." if left_out else ""
        return Picture(setting, svg, note)


def _has_own_weights(group: Group) -> bool:
    return bool(group.teachers) and not curves.is_uniform(group)


CURVES = Chart(
    anchor="curves",
    title="Learning curves",
    intro=(
        "The result over the epochs, mean and, as a band, standard deviation over runs. What lies "
        "far below the later epochs is cut off. Axes are named as in TensorBoard."
    ),
    about="The result of every method over the epochs",
    draw=curves.draw_result,
    numbers=lambda groups: curves.ending(groups, lambda group: group.runs[0].curve, 100),
    is_wide=False,
    is_open=True,
)
BY_CLASS = Chart(
    anchor="by-class",
    title="Who knows which class, and who is asked about it",
    intro=(
        "Left what teachers and students have right of each class's test images, then whom every "
        "method asks: the mean weight of each teacher over the labelled training images of a "
        "class, in the last epoch and over both heads. Of the runs with the first pool of teachers."
    ),
    about="Accuracy of teachers and students by class, and every method's weights by class",
    draw=breakdown.draw_by_class,
    keep=breakdown.knows_classes,
    missing="equal weights, no labels, or not recorded",
    numbers=lambda groups: breakdown.classes_of(groups).asked,
    is_open=True,
)
SCORE = Chart(
    anchor="score",
    title="Agent score over time",
    intro=(
        "0 is equal weights, 1 all weight on the best teacher of every sample, below 0 is worse "
        "than equal weights. Best is meant in terms of each run's own reward."
    ),
    about="Agent score of every method over the epochs",
    draw=partial(
        curves.draw_lines, x=curves.EPOCH, y=curves.entry("score"), labels=("epoch", "score")
    ),
    keep=_has_own_weights,
    missing="equal weights, or none",
    numbers=lambda groups: curves.ending(groups, lambda _: "score"),
    is_wide=False,
)
UPDATES = Chart(
    anchor="updates",
    title="Agent score by updates",
    intro=(
        "How often the policy had been updated by the end of an epoch, and the score of the "
        "epoch's weights. An update is a step of the policy's optimiser, or what an algorithm "
        "without one (TRPO, ARS) counts itself."
    ),
    about="Agent score of every method against the updates of its policy",
    draw=curves.draw_by_updates,
    keep=curves.learns_in_updates,
    missing="no updates of a policy",
    is_wide=False,
)
WEIGHTS = Chart(
    anchor="weights",
    title="Weight of each teacher over time",
    intro=(
        "Mean over the training images of an epoch, of the runs with the first pool of teachers. "
        "Bands are standard deviations over them."
    ),
    about="Mean weight of each teacher over the epochs, for every method",
    draw=curves.draw_weights,
    keep=_has_own_weights,
    missing="equal weights, or none",
    legend=(*HEAD_KEYS, UNIFORM_KEY),
    names_teachers=True,
)
CORRECTNESS = Chart(
    anchor="by-correctness",
    template="correctness.html",
    title="Weight of each teacher where it is right and wrong",
    intro=(
        "Mean over the labelled training images of the last epoch, of all runs together. Does a "
        "teacher count less where it has the class wrong? A teacher that has no image wrong has no "
        "open symbol."
    ),
    about="Mean weight of each teacher where it is right and where it is wrong, for every method",
    draw=breakdown.draw_by_correctness,
    table=breakdown.correctness_table,
    keep=lambda group: _has_own_weights(group) and breakdown.tells_right(group),
    missing="equal weights, or not recorded",
    legend=(*RIGHT_KEYS, UNIFORM_KEY),
    names_teachers=True,
)
FUSION = Chart(
    anchor="fusion",
    title="Coefficients of the fusion over time",
    intro="How much each part of the weights counts (γ of Equ. 9-14), where it is learnt.",
    about="Coefficients of the fusion over the epochs",
    draw=curves.draw_fusion,
    keep=curves.learns_fusion,
    missing="env.fusion is not learnable",
    legend=(*PART_KEYS, *HEAD_KEYS),
)


# Sections that are more than pictures.


def _results(settings: Sequence[Setting]) -> Section:
    summaries = [summary for setting in settings for summary in setting.summaries]
    metrics = list(dict.fromkeys(summary.metric for summary in summaries))
    baselines = {setting.baseline.method for setting in settings if setting.baseline}
    return Section(
        anchor="results",
        title="Results",
        intro=(
            "After the last epoch, mean ± standard deviation over seeds, or over pools of teachers "
            "where there are several (the mean of each pool's seeds). Intervals are 95\u00a0% t "
            "intervals of the mean. Differences are paired by pool and seed, and bold where they "
            "are other than zero by Holm's correction (p < 0.05) over all of this table. Agent "
            "score of the last epoch: 0 is equal weights, 1 all weight on the best teacher of "
            "every sample."
        ),
        template="results.html",
        content={
            "settings": settings,
            "metric": metrics[0] if len(metrics) == 1 else "result",
            "baseline": baselines.pop() if len(baselines) == 1 else "baseline",
            "compared": any(summary.difference for summary in summaries),
            "scored": any(summary.score for summary in summaries),
        },
        is_open=True,
    )


def _cost(settings: Sequence[Setting], palette: Palette) -> Section:
    pictures = []
    for setting in settings:
        pairs = (f"{s.method} {s.seconds.mean:.4g} s, {s.last.mean:.2%}" for s in setting.summaries)
        about = f"Result against seconds of training. {setting.heading} {'; '.join(pairs)}"
        figure = curves.draw_cost(setting.summaries, palette)
        pictures.append(Picture(setting, inline(figure, f"cost-{setting.letter}", about)))
    return Section(
        anchor="cost",
        title="Cost and result",
        intro=(
            "Seconds include the evaluations but not the teachers' training. They are those of the "
            "machine that each run had, and of what else it was doing. Bars are standard "
            "deviations over pools or seeds."
        ),
        content={"pictures": pictures, "legend": [], "wide": False},
    )


def _gallery(settings: Sequence[Setting]) -> Section:
    exhibits = [
        (setting, found)
        for setting in settings
        if (found := list(filter(None, map(make_exhibit, setting.groups))))
    ]
    return Section(
        anchor="gallery",
        title="Gallery",
        intro=(
            "Images of the last training batch with the weights that they were given, those on "
            "which the teachers disagree first; open is the method with the highest agent score. "
            "A tick marks teachers that have the class right."
        ),
        template="gallery.html",
        content=exhibits,
        missing="not recorded",
    )


def _paper(settings: Sequence[Setting]) -> Section:
    return Section(
        anchor="paper",
        title="The paper's Table 6(a)",
        intro=(
            "Yang et al., AAAI 2025: ShuffleNetV2 on CIFAR-100, three runs. Ours are of another "
            "data set and student, unless the top of this page says the same: compare the order "
            "of the algorithms and their distances, not the numbers."
        ),
        template="table.html",
        content=paper_table(settings),
        missing="none of its algorithms was run",
    )


def _configuration(settings: Sequence[Setting]) -> Section:
    runs = [run for setting in settings for group in setting.groups for run in group.runs]
    return Section(
        anchor="configuration",
        title="Configuration and versions",
        intro=(
            "The whole configuration of every run. Highlighted is what is not the same everywhere "
            "(seed, method and place aside)."
        ),
        template="configuration.html",
        content={"configurations": configurations(settings), "versions": version_table(runs)},
    )


def make_sections(settings: Sequence[Setting], palette: Palette) -> list[Section]:
    """All sections, in the order of the page."""
    charts = (CURVES, BY_CLASS, SCORE, UPDATES, WEIGHTS, CORRECTNESS, FUSION)
    return [
        _results(settings),
        *(chart.section(settings, palette) for chart in charts),
        _cost(settings, palette),
        _gallery(settings),
        _paper(settings),
        _configuration(settings),
    ]
