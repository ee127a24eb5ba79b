"""The sections of the page: what each of them shows, and why it may have nothing to show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from experiments.comparison.summary import Summary
from experiments.html_report.breakdown import (
    SYMBOLS,
    correctness_rows,
    draw_by_class,
    draw_by_correctness,
    has_breakdown,
)
from experiments.html_report.configurations import configurations, version_rows
from experiments.html_report.curves import (
    PART_COLOURS,
    draw_accuracy,
    draw_by_updates,
    draw_fusion,
    draw_methods,
    draw_weights,
    entry,
    is_uniform,
    learns_fusion,
    learns_in_updates,
)
from experiments.html_report.exhibits import Exhibit, make_exhibit
from experiments.html_report.naming import Group, Grouping
from experiments.html_report.paper import paper_rows
from experiments.html_report.runs import Run
from experiments.html_report.style import GUIDE_COLOUR, Palette
from experiments.html_report.summary import draw_cost
from experiments.html_report.svg import Key, Picture, inline

OLDER = "No run below this folder has recorded it; runs of older versions have not."

EQUAL = "All methods that have recorded it weight their teachers equally."

HEAD_KEYS = (Key("logit head", "#222222"), Key("feature head", "#222222", "dashed"))
UNIFORM_KEY = Key("equal weights", GUIDE_COLOUR, "dotted")


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        anchor: Its name in links.
        title: Its heading.
        intro: What it shows.
        template: The file that shows it.
        content: What the file is given.
        missing: Why there is nothing to show; empty where there is.
    """

    anchor: str
    title: str
    intro: str
    template: str
    content: Any
    missing: str = ""


@dataclass(frozen=True)
class Contents:
    """What all sections are made from.

    Attributes:
        runs: All runs.
        grouping: The same by setting, method and seed.
        summaries: What they came to, by setting.
        palette: Their colours.
    """

    runs: Sequence[Run]
    grouping: Grouping
    summaries: Mapping[str, Sequence[Summary]]
    palette: Palette


def _pictures(
    contents: Contents,
    anchor: str,
    description: str,
    draw: Callable[[Sequence[Group]], Figure],
    keep: Callable[[Group], bool] | None = None,
    otherwise: str = "",
) -> list[Picture]:
    """A picture for every setting, of the groups that there is something to draw of.

    Args:
        contents: What to draw.
        anchor: Name of the section.
        description: What the pictures show.
        draw: Draws the groups of a setting.
        keep: Whether there is something to draw of a group.
        otherwise: Why there is not; nothing is said if it is empty.
    """
    pictures: list[Picture] = []
    for setting, groups in contents.grouping.settings.items():
        kept = [group for group in groups if keep is None or keep(group)]
        if kept:
            about = f"{description}; {setting}" if setting else description
            svg = inline(draw(kept), f"{anchor}-{len(pictures)}", about)
            left_out = [group.method for group in groups if group not in kept]
            note = f"{otherwise}: {', '.join(left_out)}." if otherwise and left_out else ""
            pictures.append(Picture(setting, svg, note=note))
    return pictures


def _teacher_keys(contents: Contents) -> list[Key]:
    return [Key(name, colour) for name, colour in contents.palette.teachers.items()]


# Sections, in the order of the page.


def _summary(contents: Contents) -> Section:
    return Section(
        anchor="summary",
        title="Summary",
        intro=(
            "Accuracy on the test images after the last epoch, mean ± standard deviation over "
            "seeds, or over pools of teachers where there are several (the mean of each pool's "
            "seeds). Intervals are 95\u00a0% t intervals of the mean. The difference to aver is "
            "paired by pool and seed, and bold where it is other than zero by Holm's correction "
            "(p < 0.05) over all differences of this page. Agent score of the last epoch: 0 is "
            "equal weights, 1 all weight on the best teacher of every sample."
        ),
        template="summary.html",
        content={"summaries": contents.summaries, "palette": contents.palette},
    )


def _curves(contents: Contents) -> Section:
    pictures = _pictures(
        contents,
        "curves",
        "Test accuracy of every method over the epochs",
        lambda groups: draw_accuracy(groups, contents.palette),
    )
    return Section(
        anchor="curves",
        title="Learning curves",
        intro=(
            "Test accuracy over the epochs: mean and, as a band, standard deviation over runs. "
            "Grey are the other methods, dotted is aver. What lies far below the later epochs is "
            "cut off."
        ),
        template="pictures.html",
        content={"pictures": pictures, "legend": []},
    )


def _score(contents: Contents) -> Section:
    pictures = _pictures(
        contents,
        "score",
        "Agent score of every method over the epochs",
        lambda groups: draw_methods(groups, entry("score"), contents.palette, "agent score"),
        keep=_has_own_weights,
        otherwise="Equal weights, score 0",
    )
    return Section(
        anchor="score",
        title="Agent score over time",
        intro=(
            "0 is equal weights, 1 all weight on the best teacher of every sample, below 0 is "
            "worse than equal weights. Best is meant in terms of each run's own reward. Grey are "
            "the other methods."
        ),
        template="pictures.html",
        content={"pictures": pictures, "legend": []},
        missing="" if pictures else EQUAL,
    )


def _updates(contents: Contents) -> Section:
    pictures = _pictures(
        contents,
        "updates",
        "Agent score of every method against the updates of its policy",
        lambda groups: draw_by_updates(groups, contents.palette),
        keep=learns_in_updates,
        otherwise="No updates of a policy",
    )
    return Section(
        anchor="updates",
        title="Agent score by updates",
        intro=(
            "Every point is an epoch: how often the policy had been updated by then, and the score "
            "of the epoch's weights. An update is a step of the policy's optimiser, or what an "
            "algorithm without one (TRPO, ARS) counts itself."
        ),
        template="pictures.html",
        content={"pictures": pictures, "legend": []},
        missing="" if pictures else "No method here counts updates of a policy.",
    )


def _weights(contents: Contents) -> Section:
    pictures = _pictures(
        contents,
        "weights",
        "Mean weight of each teacher over the epochs, for every method",
        lambda groups: draw_weights(groups, contents.palette),
        keep=_has_own_weights,
        otherwise="Equal weights",
    )
    return Section(
        anchor="weights",
        title="Weight of each teacher over time",
        intro=(
            "Mean over the training images of an epoch. Bands are standard deviations over runs."
        ),
        template="pictures.html",
        content={
            "pictures": pictures,
            "legend": [*_teacher_keys(contents), *HEAD_KEYS, UNIFORM_KEY],
        },
        missing="" if pictures else EQUAL,
    )


def _has_own_weights(group: Group) -> bool:
    return not is_uniform(group)


def _has_varied_breakdown(group: Group) -> bool:
    return has_breakdown(group) and not is_uniform(group)


def _missing_breakdown(contents: Contents) -> str:
    if not any(has_breakdown(group) for group in contents.grouping.groups):
        return OLDER
    varied = any(_has_varied_breakdown(group) for group in contents.grouping.groups)
    return "" if varied else EQUAL


def _by_class(contents: Contents) -> Section:
    pictures = _pictures(
        contents,
        "by-class",
        "Mean weight of each teacher by class, for every method",
        draw_by_class,
        keep=_has_varied_breakdown,
        otherwise="Equal weights, or not recorded",
    )
    return Section(
        anchor="by-class",
        title="Weight of each teacher by class",
        intro=(
            "Mean over the training images of a class in the last epoch, of all runs together: "
            "left half the logit head, right half the feature head. White is equal weight (1/M)."
        ),
        template="pictures.html",
        content={"pictures": pictures, "legend": []},
        missing=_missing_breakdown(contents),
    )


def _correctness_keys(contents: Contents) -> list[Key]:
    symbols = [
        Key(f"{head} head, teacher {kind}", "#222222", symbol)
        for head, (_, *both) in SYMBOLS.items()
        for kind, symbol in zip(("right", "wrong"), both, strict=True)
    ]
    return [*_teacher_keys(contents), *symbols, UNIFORM_KEY]


def _by_correctness(contents: Contents) -> Section:
    pictures = _pictures(
        contents,
        "by-correctness",
        "Mean weight of each teacher where it is right and where it is wrong, for every method",
        lambda groups: draw_by_correctness(groups, contents.palette),
        keep=_has_varied_breakdown,
        otherwise="Equal weights, or not recorded",
    )
    rows = {
        setting: correctness_rows([group for group in groups if has_breakdown(group)])
        for setting, groups in contents.grouping.settings.items()
    }
    return Section(
        anchor="by-correctness",
        title="Weight of each teacher where it is right and wrong",
        intro=(
            "Mean over the training images of the last epoch, of all runs together. Does a "
            "teacher count less where it has the class wrong? A teacher that has no image wrong "
            "has no open symbol."
        ),
        template="correctness.html",
        content={"pictures": pictures, "legend": _correctness_keys(contents), "rows": rows},
        missing=_missing_breakdown(contents),
    )


def _cost(contents: Contents) -> Section:
    pictures = [
        Picture(
            setting,
            inline(
                draw_cost(summaries, contents.palette),
                f"cost-{number}",
                f"Test accuracy against seconds of training; {setting}",
            ),
        )
        for number, (setting, summaries) in enumerate(contents.summaries.items())
    ]
    return Section(
        anchor="cost",
        title="Cost and accuracy",
        intro=(
            "Seconds include the evaluations but not the teachers' training. They are those of the "
            "machine that each run had, and of what else it was doing. Bars are standard "
            "deviations over pools or seeds."
        ),
        template="pictures.html",
        content={"pictures": pictures, "legend": []},
    )


def _gallery(contents: Contents) -> Section:
    made = {
        setting: [exhibit for group in groups if (exhibit := make_exhibit(group)) is not None]
        for setting, groups in contents.grouping.settings.items()
    }
    exhibits: dict[str, list[Exhibit]] = {
        setting: found for setting, found in made.items() if found
    }
    return Section(
        anchor="gallery",
        title="Gallery",
        intro=(
            "Images of the last training batch with the weights that they were given, those on "
            "which the teachers disagree first; open is the method with the highest agent score. "
            "A tick marks teachers that have the class right."
        ),
        template="gallery.html",
        content={"exhibits": exhibits, "palette": contents.palette},
        missing="" if exhibits else OLDER,
    )


def _fusion(contents: Contents) -> Section:
    pictures = _pictures(
        contents,
        "fusion",
        "Coefficients of the fusion over the epochs",
        draw_fusion,
        keep=learns_fusion,
    )
    legend = [Key(part, colour) for part, colour in PART_COLOURS.items()]
    return Section(
        anchor="fusion",
        title="Coefficients of the fusion over time",
        intro="How much each part of the weights counts (γ of Equ. 9-14), where it is learnt.",
        template="pictures.html",
        content={"pictures": pictures, "legend": [*legend, *HEAD_KEYS]},
        missing=(
            ""
            if pictures
            else "No run below this folder has learnt and recorded them (env.fusion: learnable)."
        ),
    )


def _paper(contents: Contents) -> Section:
    summaries = [summary for group in contents.summaries.values() for summary in group]
    return Section(
        anchor="paper",
        title="The paper's Table 6(a)",
        intro=(
            "Yang et al., AAAI 2025: ShuffleNetV2 on CIFAR-100, three runs. Ours are of another "
            "data set and student, unless the top of this page says the same: compare the order "
            "of the algorithms and their distances, not the numbers."
        ),
        template="paper.html",
        content={"rows": paper_rows(summaries)},
    )


def _configuration(contents: Contents) -> Section:
    return Section(
        anchor="configuration",
        title="Configuration and versions",
        intro=(
            "The whole configuration of every run. Highlighted is what is not the same everywhere "
            "(seed, method and place aside)."
        ),
        template="configuration.html",
        content={
            "configurations": configurations(contents.grouping.groups),
            "versions": version_rows(contents.runs),
        },
    )


SECTIONS: Sequence[Callable[[Contents], Section]] = (
    _summary,
    _curves,
    _score,
    _updates,
    _weights,
    _by_class,
    _by_correctness,
    _cost,
    _gallery,
    _fusion,
    _paper,
    _configuration,
)
