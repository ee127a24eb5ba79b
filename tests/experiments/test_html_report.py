import base64
import html
import json
import math
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from comparisons import TEACHERS
from experiments.comparison.statistics import Spread, t_interval
from experiments.comparison.summary import text_of
from experiments.drawing import literal_text
from experiments.gallery import write_gallery
from experiments.html_report.breakdown import correctness_table, pooled
from experiments.html_report.curves import Series, panels, series, settled_range
from experiments.html_report.exhibits import data_uri, make_exhibit, telling
from experiments.html_report.naming import Group, Grouping, baseline_of, group_runs
from experiments.html_report.page import render
from experiments.html_report.runs import describe, find_runs
from experiments.html_report.style import SETTINGS, inline, make_palette, spread_out
from experiments.html_report.table import (
    configurations,
    paper_table,
    version_table,
)
from experiments.running.folder import flat
from run_folders import CLASSES, IMAGES, breakdown, change_config, gallery, write_run

# A method whose name is a program, and a mistake for whoever takes it for one.
EVIL = "<script>alert('$x$ & \"y\"')</script>"

ANCHORS = [
    "results",
    "curves",
    "by-class",
    "score",
    "updates",
    "weights",
    "by-correctness",
    "fusion",
    "cost",
    "gallery",
    "paper",
    "configuration",
]

SEEDS = (0, 1, 2)
ACCURACIES = {"aver": (0.5, 0.6, 0.7), "pg": (0.75, 0.625, 0.9), EVIL: (0.25, 0.375, 0.4375)}

# Elements that have no end.
VOID = {"meta", "link", "br", "img", "use"}


class Page(HTMLParser):
    """What a browser makes of a page: elements, texts by section, tables.

    Attributes:
        tags: Name and attributes of every element.
        texts: Text of every section.
        tables: Rows of cells of every table, by section.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {"": ""}
        self.tables: dict[str, list[list[list[str]]]] = {"": []}
        self.open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.texts[self._section], self.tables[self._section] = "", []
        tables = self.tables[self._section]
        if tag == "table":
            tables.append([])
        elif tag == "tr":
            tables[-1].append([])
        elif tag in ("td", "th"):
            tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if {"style", "title", "script"} & set(self.open):
            return
        self.texts[self._section] += data
        if "td" in self.open or "th" in self.open:
            self.tables[self._section][-1][-1][-1] += data

    def all_of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_runs(root: Path, **everywhere: Any) -> None:
    """Three methods with three seeds."""
    for algo, accuracies in ACCURACIES.items():
        for seed, accuracy in zip(SEEDS, accuracies, strict=True):
            weights = dict.fromkeys(TEACHERS, 0.5) if algo == "aver" else None
            write_run(
                root / f"digits_{len(algo)}_{seed}",
                "--seed",
                str(seed),
                algo=algo,
                accuracies=(0.125, accuracy),
                weights=weights,
                score=0.0 if algo == "aver" else 0.1 * seed,
                **everywhere,
            )


def page_of(root: Path) -> tuple[str, Page]:
    text = render(find_runs(root), "A title")
    return text, Page(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The page of runs that have recorded everything."""
    root = tmp_path_factory.mktemp("runs")
    write_runs(root, recorded=True)
    return page_of(root)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of runs that have recorded their metrics alone."""
    root = tmp_path_factory.mktemp("runs")
    write_runs(root)
    return page_of(root)[1]


# The page.


class TestPage:
    def test_has_all_sections_and_links_to_them(self, written: tuple[str, Page]) -> None:
        page = written[1]
        assert [attributes["id"] for attributes in page.all_of("section")] == ANCHORS
        assert [each["href"] for each in page.all_of("a")] == [f"#{name}" for name in ANCHORS]
        assert not page.open

    def test_says_what_it_is_about(self, written: tuple[str, Page]) -> None:
        head = written[1].texts[""]
        for fact in ("A title", "9 finished runs", "3 methods", "seeds 0, 1, 2", "data digits"):
            assert fact in head

    def test_says_first_what_came_out(self, written: tuple[str, Page]) -> None:
        head = written[1].texts[""].split("A title\n")[-1].strip()
        assert head.startswith(
            "pg reaches 75.83 % test accuracy: 15.83 points ahead of aver (95 % interval -13.52 to "
            "45.18: may be chance), n = 3 seeds."
        )

    def test_stands_alone(self, written: tuple[str, Page]) -> None:
        text, page = written
        assert not re.search(r"https?://", text)
        assert "@import" not in text
        for _, attributes in page.tags:
            for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                value = attributes.get(name) or "#"
                assert value.startswith(("#", "data:"))
        assert not {"iframe", "object", "form"} & {tag for tag, _ in page.tags}
        assert page.all_of("script") == [{}]
        assert all("#" in found for found in re.findall(r"url\([^)]*\)", text))

    def test_takes_names_for_names(self, written: tuple[str, Page]) -> None:
        text, page = written
        assert text.lower().count("<script") == 1
        methods = [row[0] for row in page.tables["results"][0][1:]]
        assert EVIL in methods
        assert EVIL in page.texts["configuration"]

    def test_has_every_identifier_once_and_all_that_are_used(
        self, written: tuple[str, Page]
    ) -> None:
        text, page = written
        names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(names) == len(set(names))
        used = re.findall(r"url\(#([^)]*)\)", text)
        used += [str(each["href"])[1:] for each in page.all_of("use")]
        assert used
        assert set(used) <= set(names)

    def test_describes_its_pictures(self, written: tuple[str, Page]) -> None:
        pictures = written[1].all_of("svg")
        assert len(pictures) == 8
        assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
        ends = f"At the end: aver 60, {EVIL} 35.42, pg 75.83."
        assert str(pictures[0]["aria-label"]).endswith(ends)
        assert all(image["alt"] for image in written[1].all_of("img"))


class TestSummaryTable:
    def test_has_the_numbers_of_the_results(self, written: tuple[str, Page]) -> None:
        (table,) = written[1].tables["results"]
        cells = {row[0]: row[1:] for row in table[1:]}
        assert list(cells) == ["aver", EVIL, "pg"]
        for algo, values in ACCURACIES.items():
            mean, std = 100 * statistics.mean(values), 100 * statistics.stdev(values)
            low, high = t_interval(values) or (math.nan, math.nan)
            n, accuracy, interval, _, _, _, seconds = cells[algo]
            assert n == "3"
            assert accuracy == f"{mean:.2f} ± {std:.2f}"
            assert interval == f"[{100 * low:.2f}, {100 * high:.2f}]"
            assert seconds == "10.0 ± 0.0"
        assert cells["pg"][5] == "0.100 ± 0.100"
        assert cells["aver"][5] == "0.000 ± 0.000"

    def test_compares_with_equal_weights_seed_by_seed(self, written: tuple[str, Page]) -> None:
        (table,) = written[1].tables["results"]
        cells = {row[0]: row[4] for row in table[1:]}
        assert cells["aver"] == "–"
        # 0.25, 0.025 and 0.2.
        assert cells["pg"] == "+15.83 [-13.52, +45.18]"
        assert cells[EVIL] == "-24.58 [-29.33, -19.84]"

    def test_marks_differences_that_holm_leaves(self, written: tuple[str, Page]) -> None:
        (table,) = written[1].tables["results"]
        # Two tests: 2 × 0.0020 and 0.1461.
        assert {row[0]: row[5] for row in table[1:]} == {"aver": "–", "pg": "0.146", EVIL: "0.004"}
        marked = [each for each in written[1].all_of("td") if each.get("class") == "clear"]
        assert len(marked) == 1


class TestOtherSections:
    def test_a_legend_names_every_teacher(self, written: tuple[str, Page]) -> None:
        for name in (*TEACHERS, "logit head", "feature head", "equal weights"):
            assert name in written[1].texts["weights"]
        assert "Not in it: aver (equal weights, or none)." in written[1].texts["weights"]

    def test_who_was_asked_about_which_class_is_said(self, written: tuple[str, Page]) -> None:
        texts = [str(each["aria-label"]) for each in written[1].all_of("svg")]
        (text,) = [text for text in texts if "by class" in text]
        assert f"pg asks {TEACHERS[0]} about class 0, {TEACHERS[0]} about class 1" in text
        assert "about class 2" not in text
        assert "aver asks" not in text

    def test_weights_by_correctness_are_listed(self, written: tuple[str, Page]) -> None:
        (table,) = written[1].tables["by-correctness"]
        assert ["pg", TEACHERS[0], "100.0 %", "0", "0.750", "–", "0.625", "–"] in table
        assert ["pg", TEACHERS[1], "75.0 %", "3", "0.750", "0.125", "0.625", "0.062"] in table

    def test_scores_are_drawn_of_methods_that_learn(self, written: tuple[str, Page]) -> None:
        assert "Not in it: aver (no updates of a policy)." in written[1].texts["updates"]

    def test_pictures_hold_no_formulas(self, written: tuple[str, Page]) -> None:
        assert "mathdefault" not in written[0]

    def test_images_have_their_weights(self, written: tuple[str, Page]) -> None:
        page, made = written[1], gallery(len(TEACHERS))
        assert len(page.tables["gallery"]) == len(ACCURACIES) * IMAGES
        # First the image on which a teacher is wrong.
        first = page.tables["gallery"][0]
        texts = [
            [f"{mark} {name}", f"{made.logit[2, m]:.2f}", f"{made.feature[2, m]:.2f}"]
            for m, (mark, name) in enumerate(zip("✓✗", TEACHERS, strict=True))
        ]
        assert first[1:] == texts
        assert "class 2" in page.texts["gallery"]
        assert "image 3" in page.texts["gallery"]

    def test_the_papers_numbers_stand_beside_ours(self, written: tuple[str, Page]) -> None:
        (table,) = written[1].tables["paper"]
        assert table[1][:5] == ["pg", "78.39 ± 0.14", "75.83 ± 13.77", "3", "pg"]
        assert [row[:3] for row in table[2:]] == [
            ["dpg", "78.16 ± 0.11", "not run"],
            ["ddpg", "78.05 ± 0.22", "not run"],
            ["ppo", "78.28 ± 0.08", "not run"],
        ]
        assert "CIFAR-100" in written[1].texts["paper"]

    def test_every_run_has_its_configuration_and_versions(self, written: tuple[str, Page]) -> None:
        text = written[1].texts["configuration"]
        for run in ("digits_2_0", "digits_4_2"):
            assert run in text
        assert text.count("optimizer.epochs") == len(ACCURACIES)
        assert ["torch", "2 (9)"] in written[1].tables["configuration"][0]


class TestOlderRuns:
    def test_say_what_they_have_not_recorded(self, older: Page) -> None:
        assert list(older.texts)[1:] == [
            "results",
            *ANCHORS[1:2],
            "score",
            "weights",
            *ANCHORS[8:9],
            *ANCHORS[10:],
        ]
        last = older.texts[""]
        assert (
            "Nothing to show: Who knows which class, and who is asked about it (equal weights"
            in last
        )
        assert "Agent score by updates (no updates of a policy)" in last
        assert "over time (env.fusion is not learnable)" in last

    def test_have_everything_else(self, older: Page) -> None:
        assert len(older.all_of("svg")) == 4
        assert len(older.tables["results"][0]) == 4


@pytest.mark.parametrize("algos", [["aver"], ["aver", "none"], ["pg"]], ids=str)
def test_a_page_of_a_single_epoch_and_seed(algos: list[str], tmp_path: Path) -> None:
    for algo in algos:
        weights = dict.fromkeys(TEACHERS, 0.5) if algo != "pg" else None
        flags = ("--algo", algo)
        write_run(
            tmp_path / algo, *flags, accuracies=(0.5,), weights=weights, recorded=True, score=0.0
        )
    page = page_of(tmp_path)[1]
    assert page.tables["results"][0][1][2] == "50.00"
    weighted = {"score", "weights", "by-correctness"}
    assert weighted & page.texts.keys() == (weighted if "pg" in algos else set())


def test_runs_of_other_epochs_teachers_and_data_stand_beside_each_other(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg", "--seed", "0", recorded=True)
    write_run(tmp_path / "b", "--algo", "pg", "--seed", "1", accuracies=(0.1, 0.2, 0.3))
    one = {"a teacher with a name of its own, and a long one": 1.0}
    write_run(tmp_path / "c", "--algo", "aver", weights=one, dataset="other", recorded=True)
    write_run(tmp_path / "d", "--algo", "ppo", "--optimizer.epochs", "7", accuracies=(0.5,) * 7)
    page = page_of(tmp_path)[1]
    assert "epochs 2, 3, 7" in page.texts[""]
    assert "data digits, other" in page.texts[""]
    # A student that learns for longer is another setting.
    (table,) = page.tables["results"]
    assert [row[:2] for row in table] == [
        ["setting", "method"],
        ["A", "aver"],
        ["A", "pg"],
        ["B", "ppo"],
    ]
    assert "A epochs=30" in page.texts["results"]
    links = [each["href"] for each in page.all_of("a")]
    assert {"#setting-A", "#setting-B"} < set(links)


# Which runs there are.


def test_only_finished_runs_that_can_be_read_are_shown(tmp_path: Path) -> None:
    for name in ("deep/below/whole", "unfinished", "other_version", "lost", "damaged", "torn"):
        write_run(tmp_path / name, "--algo", "pg")
    (tmp_path / "unfinished" / "result.json").unlink()
    (tmp_path / "other_version" / "result.json").write_text('{"metric": 1}', encoding="utf-8")
    (tmp_path / "lost" / "metrics.jsonl").unlink()
    (tmp_path / "damaged" / "config.yaml").write_text("[", encoding="utf-8")
    rows = tmp_path / "torn" / "metrics.jsonl"
    rows.write_bytes(b"{\xff" + rows.read_bytes()[2:])
    found = find_runs(tmp_path)
    assert [run.name for run in found.runs] == ["deep/below/whole"]
    assert list(found.unreadable) == ["damaged", "lost", "other_version", "torn"]
    assert found.unreadable["torn"].startswith(f"{rows}, line 1: expected a JSON object, found ")
    _, page = page_of(tmp_path)
    assert "cannot be read: damaged, lost, other_version, torn." in page.texts[""]


def test_a_result_may_lack_what_has_a_default(tmp_path: Path) -> None:
    write_run(tmp_path / "earlier", "--algo", "pg")
    path = tmp_path / "earlier" / "result.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["validation"]
    path.write_text(json.dumps(values), encoding="utf-8")
    (run,) = find_runs(tmp_path).runs
    assert run.result.validation == {}


def test_a_run_may_be_the_folder_itself(tmp_path: Path) -> None:
    write_run(tmp_path / "alone", "--algo", "pg")
    (run,) = find_runs(tmp_path / "alone").runs
    assert run.name == "alone"
    assert [group.method for group in group_runs([run]).groups] == ["pg"]


def test_configurations_are_flat() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [1]}}, "e": {}}) == {
        "a.b": 1,
        "a.c.d": [1],
        "e": {},
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-4, "0.0001"),
        (None, "null"),
        (True, "true"),
        ("text: <b>", "text: <b>"),
        ([0.5, 1], "[0.5, 1]"),
        ({}, "{}"),
        (
            [
                {"network": "resnet8", "name": "", "kind": "trained", "width": 1.0, "seed": 0},
                {"network": "resnet8", "kind": "permuted", "width": 0.5, "seed": 3},
                {"network": "vgg", "name": "mine", "checkpoint": "x.pt"},
            ],
            "resnet8, resnet8 (permuted, × 0.5, seed 3), mine (x.pt)",
        ),
    ],
    ids=str,
)
def test_values_are_described_as_a_person_would(value: Any, text: str) -> None:
    assert describe(value) == text


# Which runs belong together.


def grouped(root: Path) -> Grouping:
    return group_runs(find_runs(root).runs)


def names(grouping: Grouping) -> dict[str, list[tuple[str, int]]]:
    """Methods and numbers of seeds by setting."""
    return {
        setting.name: [(group.method, len(group.runs)) for group in setting.groups]
        for setting in grouping.settings
    }


def test_runs_are_grouped_by_algorithm(tmp_path: Path) -> None:
    for algo in ("pg", "aver", "none"):
        for seed in ("0", "1"):
            write_run(tmp_path / f"{algo}{seed}", "--algo", algo, "--seed", seed)
    # The method `none` sets coefficients of its own; that makes it no other setting.
    assert names(grouped(tmp_path)) == {"": [("none", 2), ("aver", 2), ("pg", 2)]}


def test_runs_that_differ_in_the_students_training_are_other_settings(tmp_path: Path) -> None:
    for epochs in ("30", "60"):
        for algo in ("aver", "pg"):
            write_run(tmp_path / f"{algo}{epochs}", "--algo", algo, "--optimizer.epochs", epochs)
    assert names(grouped(tmp_path)) == {
        "epochs=30": [("aver", 1), ("pg", 1)],
        "epochs=60": [("aver", 1), ("pg", 1)],
    }


def test_runs_that_differ_in_the_agent_are_other_methods(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "aver")
    for reward in ("paper", "alignment"):
        write_run(tmp_path / reward, "--algo", "pg", "--env.reward", reward)
    assert {group.method for group in grouped(tmp_path).groups} == {
        "aver",
        "pg (reward=paper)",
        "pg (reward=alignment)",
    }


def test_where_a_run_took_place_makes_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg", "--device", "cpu", "--output", "x")
    write_run(tmp_path / "b", "--algo", "pg", "--seed", "1", "--threads", "2")
    assert names(grouped(tmp_path)) == {"": [("pg", 2)]}


def test_a_key_that_older_runs_lack_makes_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg")
    write_run(tmp_path / "b", "--algo", "pg", "--seed", "1")
    change_config(tmp_path / "b", novelty={"strength": 3})
    assert names(grouped(tmp_path)) == {"": [("pg", 2)]}


def test_of_repeated_runs_the_last_one_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "pg_20260102", "--algo", "pg", last=0.75)
    write_run(tmp_path / "pg_20260101", "--algo", "pg", last=0.25)
    grouping = grouped(tmp_path)
    assert [run.name for run in grouping.groups[0].runs] == ["pg_20260102"]
    assert grouping.repeated == ["pg_20260101"]
    assert "same configuration and seeds: pg_20260101." in page_of(tmp_path)[1].texts[""]


def write_comparison(root: Path) -> None:
    """The runs of a comparison, of which one is newer than its table."""
    for algo, method, setting, seed in (
        ("aver", "aver", "clean", "0"),
        ("pg", "pg (alignment)", "clean", "0"),
        ("pg", "pg (alignment)", "clean", "1"),
        ("aver", "aver", "one broken", "0"),
        ("ppo", "unknown", "clean", "0"),
    ):
        labels = ("--method", method, "--setting", setting)
        folder = root / "runs" / f"{method}-{setting}-{seed}"
        write_run(folder, "--algo", algo, "--seed", seed, *labels)
    (root / "comparison.csv").write_text(
        "setting,method,baseline\nclean,pg (alignment),aver\nclean,aver,aver\n"
        "one broken,aver,aver\n",
        encoding="utf-8",
    )


def test_runs_of_a_comparison_have_its_labels_in_its_order(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    assert names(grouped(tmp_path)) == {
        "clean": [("pg (alignment)", 2), ("aver", 1), ("unknown", 1)],
        "one broken": [("aver", 1)],
    }


def test_without_its_table_runs_of_a_comparison_have_its_labels_too(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "comparison.csv").unlink()
    assert names(grouped(tmp_path)) == {
        "clean": [("aver", 1), ("pg (alignment)", 2), ("unknown", 1)],
        "one broken": [("aver", 1)],
    }


def test_runs_of_several_folders_are_kept_apart(tmp_path: Path) -> None:
    write_comparison(tmp_path / "robustness")
    write_run(tmp_path / "single", "--algo", "pg")
    found = names(grouped(tmp_path))
    assert sorted(found) == sorted(["robustness: clean", "robustness: one broken", tmp_path.name])


def test_one_label_never_stands_for_two_configurations(tmp_path: Path) -> None:
    for digest, epochs in (("01234567", "30"), ("89abcdef", "60")):
        for seed in ("0", "1"):
            folder = tmp_path / "runs" / f"pg-seed{seed}-{digest}"
            write_run(folder, "--algo", "pg", "--seed", seed, "--optimizer.epochs", epochs)
    assert names(grouped(tmp_path)) == {
        "epochs=30": [("pg", 2)],
        "epochs=60": [("pg", 2)],
    }


def test_the_baseline_is_equal_weights(tmp_path: Path) -> None:
    for name, algo in (("aver-seed0-01234567", "aver"), ("aver_kd-seed0-01234567", "aver")):
        write_run(tmp_path / name, "--algo", algo)
    groups = grouped(tmp_path).groups
    assert (found := baseline_of(groups)) is not None
    assert found.method == "aver"
    renamed = [Group(name, groups[0].runs) for name in ("one", "two")]
    assert baseline_of(renamed) is None
    assert baseline_of(renamed, "two") is renamed[1]
    assert baseline_of(renamed[:1]) is renamed[0]
    assert baseline_of([]) is None


# Statistics.


def test_a_summary_compares_common_seeds_alone(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.5), (1, 0.625)):
        write_run(tmp_path / f"aver{seed}", "--algo", "aver", "--seed", str(seed), last=accuracy)
    for seed, accuracy in ((1, 0.75), (2, 1.0)):
        write_run(tmp_path / f"pg{seed}", "--algo", "pg", "--seed", str(seed), last=accuracy)
    baseline, ours = grouped(tmp_path).settings[0].summaries
    assert baseline.difference is None
    assert ours.difference is not None
    assert (ours.difference.mean, len(ours.difference.values)) == (0.125, 1)
    assert not ours.is_certain
    assert ours.last == Spread(0.875, pytest.approx(0.25 / math.sqrt(2)))


def test_pools_of_teachers_are_no_settings(tmp_path: Path) -> None:
    for algo, gain in (("aver", 0.0), ("pg", 0.125)):
        for pool, seed in ((0, 0), (0, 1), (3, 0), (3, 1)):
            flags = ("--algo", algo, "--teachers.seed", str(pool), "--seed", str(seed))
            flags += ("--data.labelled_seed", str(pool))
            last = 0.5 + pool / 16 + gain * (1 + seed + pool)
            write_run(tmp_path / f"{algo}{pool}{seed}", *flags, pool=pool, last=last)
    grouping = grouped(tmp_path)
    assert [setting.name for setting in grouping.settings] == [""]
    _, ours = grouping.settings[0].summaries
    assert (ours.varying, len(ours.values)) == ("pools", 2)
    assert ours.difference is not None
    assert ours.difference.interval == t_interval([0.1875, 0.5625])
    page = page_of(tmp_path)[1]
    assert "pools 0, 3" in page.texts[""]
    assert page.tables["results"][0][0][:2] == ["method", "n pools"]


def test_texts_have_no_minus_nothing() -> None:
    assert text_of(Spread(-0.0001, 0.0), digits=3) == "0.000 ± 0.000"
    assert text_of(Spread(0.98765, None), scale=100) == "98.77"


# Curves.


def test_a_series_is_mean_and_deviation_over_the_seeds_that_came_so_far(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg", accuracies=(0.25, 0.5))
    write_run(tmp_path / "b", "--algo", "pg", "--seed", "1", accuracies=(0.75, 0.5, 1.0))
    found = series(find_runs(tmp_path).runs, lambda row: row["test/accuracy"])
    assert found.epochs.tolist() == [1, 2, 3]
    assert found.mean.tolist() == [0.5, 0.5, 1.0]
    assert found.std == pytest.approx([0.5 / math.sqrt(2), 0, 0])


def test_a_series_leaves_out_what_rows_lack(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg")
    found = series(find_runs(tmp_path).runs, lambda row: row.get("novelty"))
    assert len(found.epochs) == len(found.mean) == 0


def test_the_range_of_accuracies_holds_all_last_epochs() -> None:
    rising = np.concatenate([[10.0, 50.0], np.full(38, 98.0)])
    epochs = np.arange(40.0)
    curves = [Series(epochs, rising, 0 * rising), Series(epochs, rising - 8, 0 * rising)]
    low, high = settled_range(curves)
    assert 80 < low < 90
    assert 98 < high < 100
    bad = Series(epochs, 0 * rising + 15, 0 * rising)
    assert settled_range([*curves, bad])[0] < 15


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (8, (2, 4)), (14, (4, 4))]
)
def test_panels_fit_the_page(count: int, shape: tuple[int, int]) -> None:
    figure, axes = panels(count)
    assert len(axes) == count
    assert len(figure.axes) == shape[0] * shape[1]
    assert figure.get_figwidth() <= 11.8


# Breakdowns.


def one_group(root: Path) -> Group:
    (group,) = grouped(root).groups
    return group


def test_seeds_are_weighed_by_their_numbers_of_samples(tmp_path: Path) -> None:
    for seed, (count, weight) in enumerate(((1, 0.2), (3, 0.6), (0, None))):
        folder = tmp_path / str(seed)
        write_run(folder, "--algo", "pg", "--seed", str(seed), recorded=True)
        made = breakdown(list(TEACHERS))
        made["wrong"]["count"][1] = count
        made["wrong"]["logit"][1] = weight
        (folder / "breakdown.jsonl").write_text(json.dumps(made) + "\n", encoding="utf-8")
    wrong, count = pooled(one_group(tmp_path), "wrong")
    assert wrong[0, 1] == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert count.tolist() == [0, 4]
    assert math.isnan(wrong[0, 0])
    by_class, _ = pooled(one_group(tmp_path), "class")
    assert by_class.shape == (2, CLASSES, len(TEACHERS))
    assert np.isnan(by_class[:, -1]).all()
    assert by_class[0, 1].tolist() == pytest.approx([0.6, 0.4])


def test_rows_of_correctness_are_the_breakdowns(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg", recorded=True)
    sure, other = correctness_table([one_group(tmp_path)]).rows
    assert sure[1:4] == [TEACHERS[0], "100.0 %", "0"]
    assert other[2:] == ["75.0 %", "1", "0.750", "0.125", "0.625", "0.062"]


# The gallery.


def test_images_on_which_teachers_disagree_come_first() -> None:
    correct = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=bool)
    assert telling(correct) == [3, 2, 0, 1, 4]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_are_pictures_in_the_page(channels: int, tmp_path: Path) -> None:
    image = gallery(2, channels).images[0]
    head, _, body = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    path = tmp_path / "image.png"
    path.write_bytes(base64.b64decode(body))
    pixels = (255 * matplotlib.image.imread(path)).round().astype(int)
    for shown in range(3):
        expected = image[shown if channels == 3 else 0]
        assert (pixels[..., shown] == expected).all()


def test_large_images_are_thinned_out() -> None:
    body = data_uri(np.zeros((3, 224, 200), dtype=np.uint8)).partition(",")[2]
    width, height = np.frombuffer(base64.b64decode(body)[16:24], dtype=">u4")
    assert (width, height) == (67, 75)


def test_an_exhibit_is_of_the_first_seed_that_has_images(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg", "--seed", "0")
    assert make_exhibit(one_group(tmp_path)) is None
    write_run(tmp_path / "b", "--algo", "pg", "--seed", "4", recorded=True)
    assert (found := make_exhibit(one_group(tmp_path))) is not None
    assert found["seed"] == 4
    assert len(found["cards"]) == IMAGES
    assert [right for _, right, *_ in found["cards"][0]["teachers"]] == [True, False]


def test_nobody_is_right_or_wrong_of_an_image_without_a_label(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "pg", recorded=True)
    run, made = tmp_path / "a", breakdown(list(TEACHERS))
    write_gallery(replace(gallery(len(TEACHERS)), targets=np.full(IMAGES, -1)), run)
    for kind in ("class", "right", "wrong"):
        made[kind]["count"] = [0] * len(made[kind]["count"])
    (run / "breakdown.jsonl").write_text(json.dumps(made) + "\n", encoding="utf-8")
    assert (found := make_exhibit(one_group(tmp_path))) is not None
    assert {right for card in found["cards"] for _, right, *_ in card["teachers"]} == {None}
    assert correctness_table([one_group(tmp_path)]).rows == []
    assert "✗" not in page_of(tmp_path)[0]


# Configurations, the paper, pictures.


def test_only_what_differs_between_groups_is_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "--algo", "aver", "--device", "cpu")
    write_run(tmp_path / "b", "--algo", "pg", "--env.reward", "alignment", versions={"torch": "3"})
    write_run(tmp_path / "c", "--algo", "pg", "--seed", "1", "--env.reward", "alignment")
    grouping = grouped(tmp_path)
    (_, _, first, differing), (_, _, second, _) = configurations(grouping.settings)
    assert {key: first[key] for key in differing} == {
        "env.reward": "paper",
        "agent.arguments": "{}",
    }
    assert second["seed"] == "0 | 1"
    (row,) = version_table(find_runs(tmp_path).runs).rows
    assert row[1] == "<mark>2</mark> (2), <mark>3</mark> (1)"


def test_the_papers_table_has_a_row_for_each_of_our_methods(tmp_path: Path) -> None:
    for reward in ("paper", "alignment"):
        write_run(tmp_path / reward, "--algo", "pg", "--env.reward", reward)
    table = paper_table(grouped(tmp_path).settings)
    assert table is not None
    assert [row[0] for row in table.rows] == ["pg", "pg", "dpg", "ddpg", "ppo"]
    assert table.rows[-1][1] == text_of(Spread(78.28, 0.08))


def test_methods_have_the_same_colour_wherever_they_are() -> None:
    palette = make_palette(["pg", "aver", "ppo"], ["a"])
    assert palette.methods["aver"] == make_palette(["aver"], []).methods["aver"]
    assert len({palette.methods[name] for name in ("pg", "aver", "ppo")}) == 3


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    levels = [0.5, 0.52, 0.1, 0.99, 1.0, 0.51]
    found = spread_out(levels, 0.1)
    assert np.argsort(found).tolist() == np.argsort(levels).tolist()
    assert np.diff(sorted(found)).min() >= 0.1 - 1e-9
    assert max(found) <= 1
    assert spread_out([0.0, 0.5], 0.1) == [0.0, 0.5]
    assert spread_out([0.4], 0.1) == [0.4]


def test_a_picture_is_drawn_the_same_every_time_and_has_its_own_identifiers() -> None:
    def draw(name: str) -> str:
        with literal_text(SETTINGS):
            figure = Figure()
            figure.subplots().plot([0, 1], label="_$a")
            figure.axes[0].set_title("$\\frac{ <b>")
            return inline(figure, name, 'says "<b>"')

    assert draw("a") == draw("a")
    assert "<b>" not in draw("a")
    (svg,) = Page(draw("a")).all_of("svg")
    assert svg["aria-label"] == 'says "<b>"'
    found = [
        {each["id"] for _, each in Page(draw(name)).tags if "id" in each} for name in ("a", "b")
    ]
    assert found[0].isdisjoint(found[1])


# A browser.


@pytest.fixture
def browser() -> list[str]:
    """How to start a headless browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium (Debian: chromium)")
    return [path, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]


WIDTHS = (1200, 400)

# Unfolds everything, sorts by the third column twice, and tells of sizes and of the order.
LOOK = """
<script>
for (const each of document.querySelectorAll("details")) each.open = true;
const heading = document.querySelectorAll("#results th")[2];
for (const _ of [1, 2]) heading.querySelector("button").click();
const methods = [...document.querySelectorAll("#results tbody tr")].map(r => r.cells[0].innerText);
const bare = [...document.querySelectorAll("svg, img")].filter(
  each => !(each.getAttribute("aria-label") || each.alt));
const page = document.documentElement;
parent.postMessage({width: page.clientWidth, needed: page.scrollWidth, methods, bare: bare.length,
  tables: Math.max(...[...document.querySelectorAll(".wide")].map(each => each.clientWidth))}, "*");
</script>
"""

# Frames, as no window is as narrow as a telephone.
FRAMES = """
<!DOCTYPE html>
<script>addEventListener("message", event => document.body.append(JSON.stringify(event.data), "|"))
</script>
<body>
"""


@pytest.mark.slow
def test_a_browser_shows_the_page(browser: list[str], tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", recorded=True)
    page, frames = tmp_path / "page.html", tmp_path / "frames.html"
    page.write_text(page_of(tmp_path / "runs")[0] + LOOK, encoding="utf-8")
    shown = [f'<iframe src="page.html" width="{width}" height="900"></iframe>' for width in WIDTHS]
    frames.write_text(FRAMES + "".join(shown), encoding="utf-8")
    flags = [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    flags += ["--window-size=1300,1900", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [*browser, *flags, frames.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    # Whatever the page tells its console, such as files that it misses.
    assert "CONSOLE" not in done.stderr
    told = [json.loads(text) for text in re.findall(r"\{.*?\}", html.unescape(done.stdout)[150:])]
    told = sorted((each for each in told if "needed" in each), key=lambda each: -each["width"])
    assert [each["width"] for each in told] == list(WIDTHS)
    for each in told:
        assert each["needed"] == each["width"] > each["tables"]
        assert each["methods"] == ["pg", "aver", EVIL]
        assert each["bare"] == 0


@pytest.mark.slow
def test_a_browser_prints_the_page(browser: list[str], tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", recorded=True)
    page, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(page_of(tmp_path / "runs")[0], encoding="utf-8")
    flags = [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}", page.as_uri()]
    subprocess.run([*browser, *flags], capture_output=True, timeout=300, check=True)
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
