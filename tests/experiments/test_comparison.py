from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from comparisons import EVERYTHING, load
from experiments.comparison.plan import (
    FOLDERS,
    UNNAMED,
    Comparison,
    Selection,
    find_file,
    load_comparison,
)
from experiments.comparison.statistics import Spread
from experiments.config import ExperimentConfig, parse_arguments, read_yaml, shipped_recipes
from mtkd_env.errors import ConfigError
from tiny import seldom

# Measured by benchmark.py.
COSTS = "table6c"

BENCHMARKS = FOLDERS[0]

SHIPPED = sorted(path for path in BENCHMARKS.glob("*.yaml") if path.stem != COSTS)

TWO = "methods: {aver: {}, pg: {}}\n"


def configs(comparison: Comparison) -> dict[tuple[str, str], ExperimentConfig]:
    return {(run.method, run.setting): run.config for run in comparison.runs}


# What is shipped.


@cache
def shipped(name: str, selection: Selection = EVERYTHING) -> Comparison:
    return load_comparison(find_file(name), [], selection, Path("out"))


def parts(name: str) -> list[Selection]:
    """Every method in one setting and one method in every setting: quicker than all pairs."""
    content = read_yaml(find_file(name), "comparison")
    first, baseline = [*content.get("settings", ())][:1], content["baseline"]
    return (
        [Selection(settings=tuple(first)), Selection(methods=(baseline,))]
        if first
        else [EVERYTHING]
    )


# With settings and without, with a recipe, pools, views and sources of data of their own.
OFTEN = {"generalisation", "rewards", "specialists_cifar10", "table6a", "table7", "views"}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", seldom([path.stem for path in SHIPPED], OFTEN))
def test_shipped_comparisons_are_valid(name: str, whole: bool) -> None:
    loaded = [shipped(name, part) for part in ([EVERYTHING] if whole else parts(name))]
    comparison = loaded[0]
    assert comparison.title
    assert comparison.baseline in comparison.methods
    found = {run.name: run for part in loaded for run in part.runs}
    assert len({run.config.seed for run in found.values()}) >= 3
    # No row is run twice.
    assert len({run.config.digest for run in found.values()}) == len(found)
    for (method, _), config in chain(*(configs(part).items() for part in loaded)):
        if method == "none":
            assert (config.distillation.alpha, config.distillation.beta) == (0, 0)
    # Figures of another data set than the digits say so.
    if comparison.paper:
        assert any(name in comparison.paper_title for name in ("CIFAR-100", "ImageNet"))


def test_the_comparisons_of_the_paper_are_shipped() -> None:
    assert {"table1", "table6b", "table7", "fig2", "robustness"} <= {path.stem for path in SHIPPED}


def test_the_digits_and_their_teachers_are_the_default_ones() -> None:
    (default,) = parse_arguments([])
    for config in configs(shipped("table1")).values():
        assert config.teachers == default.teachers
        assert config.student == default.student
        assert config.optimizer == default.optimizer


def test_broken_teachers_are_one_among_four_otherwise_default_ones() -> None:
    (default,) = parse_arguments([])
    found = configs(shipped("robustness", Selection(methods=("aver",))))
    for setting, kind in {"clean": "trained", "permuted": "permuted", "random": "random"}.items():
        pool = found["aver", setting].teachers
        kinds = [teacher.kind for teacher in pool.teachers]
        assert kinds == ["trained", "trained", kind, "trained"]
        assert replace(pool, teachers=default.teachers.teachers) == default.teachers


def test_the_number_of_teachers_changes_nothing_else() -> None:
    found = configs(shipped("fig2"))
    for method in ("pg", "aver"):
        full = found[method, UNNAMED].teachers
        for count in (1, 2, 3):
            config = found[f"{method}, M = {count}", UNNAMED]
            assert config.teachers == replace(full, teachers=full.teachers[:count])


def test_what_is_no_comparison_says_how_it_is_measured() -> None:
    with pytest.raises(ConfigError, match=r"mtkd benchmark --what agents"):
        shipped(COSTS)


# Layers.


RECIPE = "optimizer: {lr: 0.25, epochs: 7}\nstudent: {width: 0.5}\n"


def test_a_recipe_lies_between_the_defaults_and_the_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    text = "recipe: ./mine.yaml\nbase: {optimizer: {epochs: 9}}\n" + TWO
    config = configs(load(tmp_path, text, base=""))["aver", UNNAMED]
    assert (config.optimizer.lr, config.optimizer.epochs, config.student.width) == (0.25, 9, 0.5)
    assert Path(str(config.recipe)) == tmp_path / "mine.yaml"


def test_every_setting_may_have_a_recipe_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    text = "settings: {a: {recipe: ./mine.yaml, student: {width: 0.125}}, b: {}}\n" + TWO
    found = configs(load(tmp_path, text, base=""))
    (default,) = parse_arguments([])
    assert found["pg", "a"].optimizer.lr == 0.25
    assert found["pg", "a"].student.width == 0.125
    assert found["pg", "b"].optimizer == default.optimizer


def test_shipped_recipes_go_by_name_and_the_flag_wins(tmp_path: Path) -> None:
    first, second = sorted(shipped_recipes())[:2]
    text = f"recipe: {first}\n" + TWO
    for flags, expected in [([], first), (["--recipe", second], second)]:
        config = configs(load(tmp_path, text, *flags, base=""))["pg", UNNAMED]
        (direct,) = parse_arguments(["--algo", "pg", "--recipe", expected])
        assert config.digest == direct.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: cifar\n", r"trial\.yaml: recipe: unknown recipe 'cifar'"),
        ("recipe: no/such.yaml\n", r"such\.yaml: No such file"),
        ("base: {recipe: x}\n", "base.recipe: cannot be given here; see recipe of the file"),
    ],
)
def test_recipes_that_cannot_be_used_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text + TWO, base="")


def test_later_layers_win(tmp_path: Path) -> None:
    base = "base: {optimizer: {lr: 0.2, epochs: 20}, env: {reward: alignment}}\n"
    text = """
settings:
  short: {optimizer: {epochs: 10}, data: {train_size: 100}}
  long: {optimizer: {epochs: 40}}
methods:
  aver: {}
  quick: {algo: reference, optimizer: {epochs: 5}}
  none: {distillation: {temperature: 2}}
"""
    found = configs(load(tmp_path, text, "--data.train_size", "50", base=base))
    # the defaults under base under the setting ...
    assert found["aver", "short"].student.network == "resnet8"
    assert found["aver", "short"].optimizer.lr == 0.2
    assert [found["aver", name].optimizer.epochs for name in ("short", "long")] == [10, 40]
    # ... under configs/algo/<algo>.yaml ...
    assert found["aver", "short"].env.reward == "alignment"
    assert found["quick", "short"].env.reward == "reference"
    assert found["quick", "short"].algo == "reference"
    # ... under the method ...
    assert [found["quick", name].optimizer.epochs for name in ("short", "long")] == [5, 5]
    assert found["none", "long"].distillation.alpha == 0
    assert found["none", "long"].distillation.temperature == 2
    # ... under the flags.
    assert {config.data.train_size for config in found.values()} == {50}


def test_what_base_says_does_not_undo_a_method(tmp_path: Path) -> None:
    base = "base: {distillation: {alpha: 2, beta: 3}}\n"
    found = configs(load(tmp_path, "methods: {aver: {}, none: {}}\n", base=base))
    assert found["aver", UNNAMED].distillation.alpha == 2
    assert found["none", UNNAMED].distillation.alpha == 0


def test_arguments_of_the_agent_are_merged_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("agent: {arguments: {hidden: 8}}\n", encoding="utf-8")
    text = "methods: {slow: {algo: pg, agent: {arguments: {lr: 5e-4}}}}\n"
    flags = ["--config", str(file), "--agent.arguments.passes", "2"]
    (run,) = load(tmp_path, text, *flags, base="").runs
    assert run.config.agent.arguments == {
        "optimizer": "adam",
        "lr": 0.0005,
        "passes": 2,
        "hidden": 8,
    }


def test_a_pool_is_found_beside_the_file(tmp_path: Path) -> None:
    pool = "teachers: [{network: resnet8}]\n"
    (tmp_path / "pool.yaml").write_text(pool, encoding="utf-8")
    text = "base: {teachers: pool.yaml}\nmethods: {aver: {}}\n"
    (run,) = load(tmp_path, text, base="").runs
    assert [teacher.network for teacher in run.config.teachers.teachers] == ["resnet8"]


# Runs.


def test_every_method_is_run_once_before_the_next_seed(tmp_path: Path) -> None:
    text = TWO + "settings: {a: {}, b: {}}\nseeds: [3, 1]\n"
    order = [(run.config.seed, run.setting, run.method) for run in load(tmp_path, text).runs]
    assert order == [
        (seed, setting, method)
        for seed in (3, 1)
        for setting in ("a", "b")
        for method in ("aver", "pg")
    ]


def test_folders_say_what_they_hold_and_change_with_the_configuration(tmp_path: Path) -> None:
    text = "methods: {'pg (no. 1)/x': {algo: pg}}\nsettings: {half width: {}}\n"
    (run,) = load(tmp_path, text, base="").runs
    assert run.folder.parent == tmp_path / "out" / "runs"
    assert run.folder.name == f"pg_no._1_x-half_width-seed0-{run.config.digest[:8]}"
    assert run.name == "pg (no. 1)/x half width seed 0"

    def folder(*flags: str) -> Path:
        return load(tmp_path, text, *flags, base="").runs[0].folder

    assert folder("--optimizer.lr", "0.3") != run.folder
    # Where it is computed makes no difference.
    assert folder("--device", "cpu", "--threads", "2", "--cache", "here") == run.folder


def test_a_part_of_a_comparison_is_selected(tmp_path: Path) -> None:
    text = "methods: {aver: {}, pg: {}, none: {}}\nsettings: {a: {}, b: {}}\nseeds: [0, 1]\n"
    selection = Selection(methods=["none", "aver"], settings=["b"], seeds=[5])
    found = load(tmp_path, text, selection=selection)
    assert [(run.method, run.setting, run.config.seed) for run in found.runs] == [
        ("aver", "b", 5),
        ("none", "b", 5),
    ]


def test_figures_of_the_paper_are_read(tmp_path: Path) -> None:
    text = """
methods: {aver: {}, pg: {}, none: {}}
settings: {a: {}, b: {}}
paper_title: paper (elsewhere)
paper:
  aver: 76.83
  pg: {a: 78.39 ± 0.14, b: [70, 0.5]}
"""
    found = load(tmp_path, text)
    assert found.paper_title == "paper (elsewhere)"
    assert found.paper == {
        ("aver", "a"): Spread(76.83, None),
        ("aver", "b"): Spread(76.83, None),
        ("pg", "a"): Spread(78.39, 0.14),
        ("pg", "b"): Spread(70, 0.5),
    }


# Mistakes.

# Seeds and pools.


@pytest.mark.parametrize(
    ("text", "selection", "expected"),
    [
        ("", Selection(), [(0, 0)]),
        ("seeds: [3, 1]", Selection(), [(0, 3), (0, 1)]),
        ("pools: [0, 4]", Selection(), [(0, 0), (4, 4)]),
        ("pools: [0, 4]\nseeds: [7, 8]", Selection(), [(0, 7), (0, 8), (4, 7), (4, 8)]),
        ("pools: [0, 4]", Selection(seeds=[7]), [(0, 7), (4, 7)]),
        ("seeds: [1, 2]", Selection(pools=[5]), [(5, 1), (5, 2)]),
        ("", Selection(pools=[5, 6]), [(5, 5), (6, 6)]),
    ],
    ids=str,
)
def test_runs_are_of_every_pool_and_seed(
    text: str, selection: Selection, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    runs = load(tmp_path, TWO + text, selection=selection).runs
    drawn = [(run.config.teachers.seed, run.config.seed) for run in runs if run.method == "pg"]
    assert drawn == expected
    assert [run.method for run in runs] == ["aver", "pg"] * len(expected)
    assert len({run.folder for run in runs}) == len(runs)


def test_a_pool_is_part_of_a_runs_name_and_folder(tmp_path: Path) -> None:
    (run, *_) = load(tmp_path, TWO + "pools: [4]\nseeds: [7]").runs
    assert run.name == "aver pool 4 seed 7"
    assert run.folder.name.startswith("aver-pool4-seed7-")
    (run, *_) = load(tmp_path, TWO + "seeds: [7]").runs
    assert run.name == "aver seed 7"


def test_labels_are_the_pools_unless_their_seeds_are_set(tmp_path: Path) -> None:
    def seeds(*flags: str) -> list[tuple[int | None, int | None]]:
        runs = load(tmp_path, "methods: {aver: {}}\npools: [0, 4]", *flags).runs
        return [(run.config.data.labelled_seed, run.config.data.label_noise_seed) for run in runs]

    assert seeds() == [(0, 0), (4, 4)]
    assert seeds("--data.labelled_seed", "0") == [(0, 0), (0, 4)]
    assert seeds("--data.label_noise_seed", "7") == [(0, 7), (4, 7)]


def test_every_pool_of_teachers_is_a_task_that_says_which(tmp_path: Path) -> None:
    comparison = load(tmp_path, TWO + "pools: [0, 4]\nseeds: [7, 8]")
    tasks = comparison.kind.teachers([run.config for run in comparison.runs], tmp_path / "log")
    assert [(task.name, len(users)) for task, users in tasks] == [
        ("teachers pool 0", 4),
        ("teachers pool 4", 4),
    ]


def test_runs_without_teachers_have_no_pools(tmp_path: Path) -> None:
    text = "kind: segmentation\nmethods: {random: {resnet18: random}}\npools: [0]"
    text += "\nbase: {backbone: resnet18}\nsettings: {near: {recipe: ade20k}}"
    with pytest.raises(ConfigError, match=r"trial\.yaml: pools: expected none, these runs have no"):
        load(tmp_path, text, "--data=here", base="")


MISTAKES: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("methodss: {aver: {}}", ["unknown key 'methodss'; did you mean 'methods'?"]),
    "no method": ("title: None", ["methods: expected at least one"]),
    "list of methods": ("methods: [aver]", ["methods: expected keys and values, found ['aver']"]),
    "list of settings": (
        "methods: {aver: }\nsettings: [a]",
        ["settings: expected keys and values"],
    ),
    "number for a method": ("methods: {aver: 3}", ["methods.aver: expected keys and values"]),
    "unknown method": ("methods: {avr: {}}", ["methods.avr", "did you mean 'aver'?"]),
    "unknown algorithm": ("methods: {a: {algo: pgg}}", ["methods.a", "did you mean 'pg'?"]),
    "unknown argument": (
        "methods: {pg: {agent: {arguments: {lrr: 1}}}}",
        ["methods.pg", "agent.arguments.lrr", "did you mean 'lr'?"],
    ),
    "number for arguments": (
        "methods: {pg: {agent: {arguments: 1}}}",
        ["methods.pg: agent.arguments: expected keys and values, got 1"],
    ),
    "unknown choice": ("methods: {pg: {env: {reward: papr}}}", ["methods.pg", "'paper'?"]),
    "unknown term": ("methods: {pg: {distillation: {logit: kdd}}}", ["methods.pg", "'kd'?"]),
    "unknown network": ("methods: {pg: {student: {network: resnt8}}}", ["'resnet8'?"]),
    "unknown key of a method": (
        "methods: {pg: {env: {rewardd: paper}}}",
        ["methods.pg: ", "did you mean 'env.reward'?"],
    ),
    "unknown key of a setting": (
        "methods: {pg: {}}\nsettings: {a: {optimzer: {lr: 1}}}",
        ["settings.a: ", "did you mean 'optimizer'?"],
    ),
    "unknown key of all": (
        "base: {sed: 1}\nmethods: {pg: {}}",
        ["base: ", "did you mean 'seed'?"],
    ),
    "too long a warm-up": (
        "methods: {aver: {}, pg: {warmup: {epochs: 99}}}",
        ["methods.pg: warmup.epochs: expected 0 to optimizer.epochs = 30, got 99"],
    ),
    "missing pool": ("base: {teachers: no.yaml}\nmethods: {pg: {}}", ["base: ", "no.yaml"]),
    "a seed": ("methods: {pg: {seed: 1}}", ["methods.pg.seed: cannot be given here; see seeds"]),
    "an output": ("base: {output: x}\nmethods: {pg: {}}", ["base.output", "see --output"]),
    "a method of all": ("base: {algo: pg}\nmethods: {pg: {}}", ["base.algo", "see methods"]),
    "unknown baseline": ("methods: {pg: {}}\nbaseline: pgg", ["unknown baseline 'pgg'", "'pg'?"]),
    "one seed": ("methods: {pg: {}}\nseeds: 3", ["seeds: expected different numbers >= 0, got 3"]),
    "no seed": ("methods: {pg: {}}\nseeds: []", ["seeds: expected", "[]"]),
    "seed twice": ("methods: {pg: {}}\nseeds: [1, 1]", ["seeds: expected", "[1, 1]"]),
    "negative seed": ("methods: {pg: {}}\nseeds: [-1]", ["seeds: expected", "[-1]"]),
    "a pool twice": ("methods: {pg: {}}\npools: [1, 1]", ["pools: expected", "[1, 1]"]),
    "a pool's seed beside pools": (
        "base: {teachers: {seed: 2}}\nmethods: {pg: {}}\npools: [1]",
        ["teachers.seed: cannot be given beside pools"],
    ),
    "unknown method of the paper": (
        "methods: {pg: {}}\npaper: {pgg: 1}",
        ["unknown method of the paper 'pgg'; did you mean 'pg'?"],
    ),
    "unknown setting of the paper": (
        "methods: {pg: {}}\nsettings: {near: {}}\npaper: {pg: {neer: 1}}",
        ["unknown setting of the paper 'neer'; did you mean 'near'?"],
    ),
    "word of the paper": ("methods: {pg: {}}\npaper: {pg: much}", ["paper.pg", "'much'"]),
    "three numbers of the paper": ("methods: {pg: {}}\npaper: {pg: [1, 2, 3]}", ["paper.pg"]),
    "text": ("just text", ["expected keys and values, found 'just text'"]),
    "broken": ("a: [1\nb: 2\n", ["not valid YAML"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line_with_the_file(case: str, tmp_path: Path) -> None:
    text, expected = MISTAKES[case]
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, base="")
    message = str(error.value)
    assert str(tmp_path / "trial.yaml") in message
    assert "\n" not in message
    for part in expected:
        assert part in message
    assert message.count("did you mean") <= 1


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(methods=["pgg"]), "unknown method 'pgg'; did you mean 'pg'?"),
        (Selection(settings=["a"]), "unknown setting 'a'"),
        (Selection(seeds=[-1]), "seeds: expected"),
    ],
    ids=str,
)
def test_a_selection_of_what_is_not_there_is_a_mistake(
    selection: Selection, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"trial\.yaml") as error:
        load(tmp_path, TWO, selection=selection)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--optimizer.lrr", "1"], "did you mean '--optimizer.lr'?"),
        (["--algo", "pg"], "--algo: a comparison's methods stand in its file"),
    ],
    ids=str,
)
def test_flags_that_no_run_takes_are_mistakes(
    flags: list[str], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, TWO, *flags)
    assert expected in str(error.value)
    assert "trial.yaml" not in str(error.value)


def test_images_that_are_not_there_are_found_missing(tmp_path: Path) -> None:
    text = "settings: {far: {data: {dataset: npz, arguments: {path: no.npz}}}}\n" + TWO
    comparison = load(tmp_path, text)
    with pytest.raises(ConfigError, match=r"no\.npz"):
        comparison.kind.check_data([run.config for run in comparison.runs])


def test_shipped_comparisons_have_short_names() -> None:
    assert find_file("table1") == BENCHMARKS / "table1.yaml"
    assert find_file("some/where.yaml") == Path("some/where.yaml")
    with pytest.raises(ConfigError, match="did you mean 'table1'"):
        find_file("tabel1")
