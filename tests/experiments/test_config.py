import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from experiments.config import CONFIGS, ExperimentConfig, parse_arguments
from experiments.config.help import NAMES
from experiments.config.layers import keys_of
from experiments.config.parsing import type_of
from experiments.experiment import make_folder
from mtkd_env.data import DATASETS
from mtkd_env.errors import ConfigError
from tiny import seldom

ALGOS = sorted(path.stem for path in CONFIGS.glob("algo/*.yaml"))
POOLS = sorted(CONFIGS.glob("pool/*.yaml"))

WriteFile = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """Writes texts into files of their own; gives the path of each."""

    def write_file(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def parse(*flags: str) -> ExperimentConfig:
    (config,) = parse_arguments(flags)
    return config


# Numbers.

TYPES = {key: type_of(ExperimentConfig, key) for key in keys_of(ExperimentConfig)}
NUMBERS = [key for key, kind in TYPES.items() if {int, float} & {kind, *get_args(kind)}]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("text", ["-1", ".nan"])
def test_a_number_that_cannot_be_is_refused_by_its_whole_key(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        parse(f"--{key}={text}")


# What is shipped.


@pytest.mark.parametrize("algo", [*ALGOS, "aver", "oracle", "uniform", "tqc"])
def test_shipped_methods_load_and_their_arguments_fit(algo: str) -> None:
    config = parse("--algo", algo)
    assert config.algo == algo
    config.check_agent()


@pytest.mark.parametrize("algo", ALGOS)
def test_files_of_methods_hold_nothing_that_is_lost(algo: str) -> None:
    content = yaml.safe_load((CONFIGS / "algo" / f"{algo}.yaml").read_text(encoding="utf-8"))
    config = dataclasses.asdict(parse("--algo", algo))
    for section, values in content.items():
        for key, value in values.items():
            assert config[section][key] == with_numbers(value), (section, key)


def with_numbers(value: Any) -> Any:
    """What YAML 1.1 takes for a text: 5e-4, without a point."""
    if isinstance(value, dict):
        return {key: with_numbers(entry) for key, entry in value.items()}
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@pytest.mark.parametrize("pool", POOLS, ids=lambda path: path.stem)
def test_shipped_pools_load(pool: Path) -> None:
    config = parse("--teachers", str(pool))
    content = yaml.safe_load(pool.read_text(encoding="utf-8"))
    assert [teacher.network for teacher in config.teachers.teachers] == [
        teacher["network"] for teacher in content["teachers"]
    ]


@pytest.mark.parametrize("kind", ["permuted", "random"])
def test_pools_of_digits_have_one_broken_teacher_and_those_of_the_default(kind: str) -> None:
    config = parse("--teachers", str(CONFIGS / "pool" / f"digits_{kind}.yaml"))
    assert [one.kind for one in config.teachers.teachers if one.kind != "trained"] == [kind]
    # All other teachers, and so their checkpoints in the cache, are those of the default.
    default = parse().teachers
    assert config.teachers.recipe == default.recipe
    assert config.teachers.batch_size == default.batch_size


def test_some_methods_and_pools_are_shipped() -> None:
    assert {"pg", "ppo", "a2c", "ddpg", "td3", "sac", "trpo", "none", "reference"} <= set(ALGOS)
    assert POOLS


def test_no_distillation_means_no_loss_from_teachers() -> None:
    config = parse("--algo", "none")
    assert (config.distillation.alpha, config.distillation.beta) == (0, 0)


# Layers.


def test_later_layers_win(write: WriteFile) -> None:
    default = parse("--algo", "aver")
    assert default.warmup.weights == "uniform"
    assert default.optimizer.epochs == 30
    # configs/algo over the defaults of the classes ...
    assert parse("--algo", "reference").warmup.weights == "ones"
    first = write("warmup: {weights: uniform}\noptimizer: {epochs: 9, lr: 0.3}\n")
    second = write("optimizer: {epochs: 8}\n")
    # ... --config over both, a later one over an earlier one ...
    config = parse("--algo", "reference", "--config", first, "--config", second)
    assert config.warmup.weights == "uniform"
    assert (config.optimizer.epochs, config.optimizer.lr) == (8, 0.3)
    # ... and flags over all, wherever they stand.
    config = parse("--optimizer.epochs", "7", "--config", first, "--algo", "reference")
    assert (config.optimizer.epochs, config.optimizer.lr) == (7, 0.3)
    assert config.env.reward == "reference"


def test_a_file_may_name_the_method(write: WriteFile) -> None:
    path = write("algo: pg\n")
    assert parse("--config", path).agent.arguments["passes"] == 4
    assert parse("--config", path, "--algo", "ppo").algo == "ppo"
    assert parse("--config", path, "--config", write("algo: sac\n")).algo == "sac"
    assert parse("--config", path, "--config", write("seed: 3\n")).algo == "pg"


def test_arguments_of_the_agent_are_merged_key_by_key(write: WriteFile) -> None:
    path = write("agent: {arguments: {lr: 0.5, hidden: 8}}\n")
    last = write("agent: {arguments: {hidden: 9}}\n")
    config = parse("--algo", "pg", "--config", path, "--config", last)
    assert config.agent.arguments == {"optimizer": "adam", "lr": 0.5, "passes": 4, "hidden": 9}
    config = parse("--algo", "pg", "--config", path, "--agent.arguments.passes", "2")
    assert config.agent.arguments == {"optimizer": "adam", "lr": 0.5, "passes": 2, "hidden": 8}
    for flag in (["--agent.arguments", '{"passes": 2}'], ['--agent.arguments={"passes": 2}']):
        config = parse("--algo", "pg", "--config", path, *flag)
        assert config.agent.arguments == {"optimizer": "adam", "lr": 0.5, "passes": 2, "hidden": 8}


def test_other_values_are_replaced(write: WriteFile) -> None:
    config = parse("--config", write("optimizer: {milestones: [0.5]}\nenv: {fusion: [1, 0, 0]}\n"))
    assert config.optimizer.milestones == (0.5,)
    assert config.env.fusion == [1, 0, 0]


@pytest.mark.parametrize(
    "flags",
    [
        ("--algo", "pg", "--agent.arguments.lr", "5e-4"),
        ("--algo", "pg", "--agent.arguments", "{lr: 5e-4}"),
        ("--algo=pg", "--agent.arguments.lr=5e-4"),
    ],
    ids=str,
)
def test_numbers_in_scientific_notation_are_numbers(flags: tuple[str, ...]) -> None:
    assert parse(*flags).agent.arguments["lr"] == 0.0005


def test_texts_of_flags_are_what_was_typed() -> None:
    flags = ["--method", "a #b", "--setting", "null", "--cache", "null"]
    config = parse(*flags, "--data.dataset", "npz", "--data.arguments.name", "x #y: [z")
    assert (config.method, config.setting, config.cache) == ("a #b", "null", None)
    assert config.data.arguments == {"name": "x #y: [z"}


def test_numbers_in_scientific_notation_are_numbers_in_files_too(write: WriteFile) -> None:
    path = write("agent: {arguments: {lr: 5e-4}}\noptimizer: {lr: 1e-2}\n")
    config = parse("--algo", "pg", "--config", path)
    assert config.agent.arguments["lr"] == 0.0005
    assert config.optimizer.lr == 0.01
    assert isinstance(parse("--algo", "a2c").agent.arguments["learning_rate"], float)


def test_teachers_are_given_by_a_file_and_changed_by_flags(write: WriteFile) -> None:
    pool = str(POOLS[0])
    config = parse("--teachers", pool, "--teachers.recipe.epochs", "3")
    assert config.teachers.recipe.epochs == 3
    assert config.teachers.teachers == parse("--teachers", pool).teachers.teachers
    assert parse("--config", write(f"teachers: {pool}\n")) == parse("--teachers", pool)
    config = parse("--teachers.teachers", "[{network: resnet8, kind: random, seed: 3}]")
    (teacher,) = config.teachers.teachers
    assert (teacher.label, teacher.seed) == ("resnet8-random", 3)


def test_teachers_may_be_named_alone(write: WriteFile) -> None:
    teachers = parse("--teachers.teachers", "[{network: resnet8}, {network: wrn_16_1}]").teachers
    names = "[resnet8, wrn_16_1]"
    assert parse("--teachers.teachers", names).teachers == teachers
    assert parse("--teachers", names).teachers == teachers
    assert parse("--teachers", write(f"teachers: {names}")).teachers == teachers
    assert parse("--config", write(f"teachers: {names}")).teachers == teachers


@pytest.mark.parametrize("text", ["0", "1e-3", "null", "true", "[1]", "0x1", "2026-01-01"])
def test_what_is_quoted_is_a_text(text: str, write: WriteFile) -> None:
    data = {"dataset": "npz", "arguments": {"path": text}}
    quoted = partial(yaml.safe_dump, default_style="'")
    path = {"path": str(Path.cwd() / text)}
    flags = ["--data.dataset", "npz", "--data.arguments"]
    assert parse(*flags, quoted(data["arguments"])).data.arguments == path
    assert parse(*flags[:2], "--data.arguments.path", f"'{text}'").data.arguments == path
    assert parse("--config", write(quoted({"data": data}))).data.arguments == path
    pool = write(quoted({"teachers": [{"network": "resnet8", "classes": [text, "b"]}]}))
    assert parse("--teachers", pool).teachers.teachers[0].classes == (text, "b")


def test_several_methods_differ_in_nothing_but_their_own_files() -> None:
    flags = ["--seed", "4", "--optimizer.epochs", "3"]
    found = parse_arguments(["--algo", "pg, ppo,aver", *flags])
    assert found == [parse("--algo", name, *flags) for name in ("pg", "ppo", "aver")]


def test_empty_files_change_nothing(write: WriteFile) -> None:
    assert parse("--config", write("")) == parse()
    assert parse("--config", write("# Nothing yet.\n")) == parse()


# A run's own configuration.


@pytest.mark.parametrize(
    "flags",
    [
        *seldom([["--algo", algo] for algo in (*ALGOS, "aver")], [["--algo", "aver"]]),
        ["--algo", "pg", "--agent.arguments", "{lr: 5e-4, agent_every: null}"],
        ["--algo", "stable_baselines3:PPO", "--agent.arguments.n_steps", "2 epochs"],
        ["--algo", "sac", "--teachers", str(POOLS[0]), "--cache", "here", "--device", "cpu"],
        ["--env.fusion", "[0.5, 0.5, 0]", "--optimizer.milestones", "[]", "--seed", "7"],
        ["--data.dataset", "npz", "--data.arguments.path", "a file.npz"],
        ["--data.train_size", "100", "--env.reward_normalization", "center"],
    ],
    ids=str,
)
def test_written_configurations_read_as_equal(flags: list[str], write: WriteFile) -> None:
    config = parse(*flags)
    path = write(config.to_yaml())
    assert parse("--config", path) == config
    assert parse("--config", path).to_yaml() == config.to_yaml()


def test_written_configurations_are_complete() -> None:
    content = yaml.safe_load(parse("--algo", "pg").to_yaml())
    assert content.keys() == ExperimentConfig.__dataclass_fields__.keys()
    assert content["optimizer"]["momentum"] == 0.9
    assert content["teachers"]["teachers"][0]["network"] == "resnet8"


def test_the_digest_is_that_of_what_the_numbers_depend_on() -> None:
    config = parse("--algo", "pg")
    assert parse("--algo", "pg").digest == config.digest
    here = ("--output here", "--cache there", "--device cpu", "--threads 2", "--compile default")
    for flags in (*here, "--precision fp32", "--env.on_nan skip"):
        assert parse("--algo", "pg", *flags.split()).digest == config.digest
    computed = ("--precision bf16", "--teacher_precision int8")
    for flags in ("--seed 1", "--env.reward alignment", "--agent.arguments.lr 1", *computed):
        assert parse("--algo", "pg", *flags.split()).digest != config.digest
    digests = [parse("--teachers", str(pool)).digest for pool in POOLS]
    assert len(set(digests)) == len(POOLS)


# Mistakes.

FLAGS = {
    "a method twice": ("--algo aver,aver", ["--algo: expected different names, commas between"]),
    "unknown flag": ("--optimizer.lrr 1", ["--optimizer.lrr", "did you mean '--optimizer.lr'?"]),
    "unknown group": ("--optimzer.lr 1", ["--optimzer.lr", "did you mean '--optimizer.lr'?"]),
    "unknown flag with =": ("--optimizer.lrr=1", ["did you mean '--optimizer.lr'?"]),
    "abbreviation": ("--optimizer.epoch 1", ["did you mean '--optimizer.epochs'?"]),
    "short flag": ("--epoch 1", ["--epoch", "did you mean '--epochs'?"]),
    "last part": ("--reward paper", ["--reward", "did you mean '--env.reward'?"]),
    "last part of several": ("--lr 1", ["--lr", "did you mean '--optimizer.lr'?"]),
    "flag of the program": ("--resum x", ["--resum", "did you mean '--resume'?"]),
    "inline teacher": (
        '--teachers {"teachers":[{"network":"resnet8"},{"imges":1}]}',
        ["teachers.teachers.1.imges", "did you mean 'images'?"],
    ),
    "abbreviated method": ("--alg pg", ["--alg", "did you mean '--algo'?"]),
    "abbreviated file": ("--conf x.yaml", ["--conf", "did you mean '--config'?"]),
    "no flag": ("pg", ["unrecognized arguments: pg"]),
    "word for a number": ("--optimizer.epochs ten", ["optimizer.epochs", "int", "ten"]),
    "fraction for a count": ("--optimizer.epochs 1.5", ["optimizer.epochs", "int", "1.5"]),
    "not a number": ("--optimizer.lr nan", ["optimizer.lr", "nan"]),
    "word for a switch": ("--optimizer.nesterov maybe", ["optimizer.nesterov", "bool", "maybe"]),
    "number for a list": ("--optimizer.milestones 1", ["optimizer.milestones", "list"]),
    "no epochs": ("--optimizer.epochs 0", ["epochs: expected at least 1, got 0"]),
    "negative rate": ("--optimizer.lr -1", ["lr: expected a finite number >= 0, got -1"]),
    "negative seed": ("--seed -1", ["seed: expected a finite number >= 0, got -1"]),
    "warm-up too long": (
        "--warmup.epochs 31",
        ["warmup.epochs: expected 0 to optimizer.epochs = 30, got 31"],
    ),
    "negative warm-up": ("--warmup.epochs -1", ["warmup.epochs", "got -1"]),
    "missing pool": ("--teachers /no/such.yaml", ["teachers", "/no/such.yaml"]),
    "missing file": ("--config /no/such.yaml", ["--config", "/no/such.yaml", "No such file"]),
    "folder": ("--config /", ["--config: /: Is a directory"]),
    "no method": ("--algo", ["--algo: expected a value"]),
    "flag for a method": ("--algo --seed 1", ["--algo: expected a value"]),
    "no file": ("--seed 1 --config", ["--config: expected a value"]),
    "empty method": ("--algo pg,", ["--algo: expected different names", "'pg,'"]),
    "no arguments": ("--agent.arguments 3", ["agent.arguments: expected keys", "got 3"]),
    "broken arguments": ("--agent.arguments {a", ["agent.arguments: expected keys", "'{a'"]),
}

FILES = {
    "unknown key": ("optimizer: {lrr: 1}", ["lrr", "did you mean 'optimizer.lr'?"]),
    "unknown section": ("optimzer: {lr: 1}", ["optimzer", "did you mean 'optimizer'?"]),
    "unknown key at the top": ("sed: 1", ["sed", "did you mean 'seed'?"]),
    "unknown key of a teacher": (
        "teachers: {teachers: [{netwrk: resnet8}]}",
        ["netwrk", "did you mean 'network'?"],
    ),
    "unknown network": (
        "teachers: {teachers: [{network: resnet9}]}",
        ["unknown network 'resnet9'", "did you mean 'resnet8'?"],
    ),
    "wrong type": ("optimizer: {lr: fast}", ["optimizer.lr", "float", "fast"]),
    "list": ("- a\n- b\n", ["expected keys and values, found ['a', 'b']"]),
    "text": ("just text", ["expected keys and values, found 'just text'"]),
    "broken": ("a: [1\nb: 2\n", ["not valid YAML"]),
    "number for a section": (
        "optimizer: 3",
        ["optimizer: expected Recipe or its fields by name, got 3"],
    ),
    "name of no file for a section": (
        "teachers: teams",
        ["teachers: expected a file *.yaml or its fields by name, got '"],
    ),
    "nothing in a section": ("agent:\n", ["agent: expected keys and values, got None"]),
    "number for arguments": (
        "agent: {arguments: 3}",
        ["agent.arguments: expected keys and values, got 3"],
    ),
    "list for the agent": (
        "agent: [1]",
        ["agent: expected AgentConfig or its fields by name, got [1]"],
    ),
    "number for a key": ("1: 2", ["1: unknown key"]),
}


def message_of(flags: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_arguments(flags)
    return str(error.value)


@pytest.mark.parametrize("case", FLAGS)
def test_mistakes_in_flags_are_told_in_one_line(case: str) -> None:
    flags, expected = FLAGS[case]
    message = message_of(flags.split())
    assert "\n" not in message
    for part in expected:
        assert part in message
    assert message.count("did you mean") <= 1


@pytest.mark.parametrize("case", FILES)
def test_mistakes_in_files_are_told_in_one_line_with_the_file(case: str, write: WriteFile) -> None:
    text, expected = FILES[case]
    good, bad = write("seed: 1"), write(text)
    message = message_of(["--config", good, "--config", bad, "--data.batch_size", "8"])
    assert bad in message
    assert good not in message
    assert "\n" not in message
    for part in expected:
        assert part in message
    assert message.count("did you mean") <= 1


def test_broken_bytes_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    message = message_of(["--config", str(path)])
    assert str(path) in message
    assert "not valid YAML" in message
    assert "\n" not in message


# Questions.


def test_help_names_what_options_may_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    helps = dict(re.findall(r"^  --([\w.]+)(.*?)(?=^\S|^  --|\Z)", shown, re.M | re.S))
    for key, names in NAMES.items():
        assert {*names} <= {*re.findall(r"[\w+-]+", re.sub(r"-\s+", "-", helps[key]))}, key
    for name, load in DATASETS.items():
        arguments = ", ".join(inspect.signature(load).parameters) or "none"
        assert f"{name}: {arguments}" in " ".join(helps["data.arguments"].split())


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_all_keys_are_shown(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--algo", "pg", flag], "my_program.py")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, field in ExperimentConfig.__dataclass_fields__.items():
        assert name in shown
        if dataclasses.is_dataclass(field.type):
            for key in field.type.__dataclass_fields__:
                assert key in shown
    if flag == "--help":
        assert "my_program.py" in shown
        assert "--agent.arguments" in shown


def test_printed_configuration_is_the_one_in_force(
    write: WriteFile, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--algo", "sac", "--seed", "5", "--print_config"])
    printed = capsys.readouterr().out
    assert parse("--config", write(printed)) == parse("--algo", "sac", "--seed", "5")


# Places.


def test_what_a_run_reads_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(here)
    (here / "teacher.pt").touch()
    (here / "mine.yaml").write_text("data: {batch_size: 32}")
    config = parse(
        *("--recipe", "mine.yaml", "--cache", "kept", "--output", "~/runs", "--algo", "aver"),
        *("--data.dataset", "npz", "--data.arguments", "{path: ~/images.npz, name: a/b}"),
        *("--teachers.teachers", "[{network: resnet8, checkpoint: teacher.pt}]"),
    )
    assert config.recipe == str(here / "mine.yaml")
    assert config.cache == str(here / "kept")
    assert config.output == str(tmp_path / "runs")
    assert config.data.arguments == {"path": str(tmp_path / "images.npz"), "name": "a/b"}
    assert config.teachers.teachers[0].checkpoint == str(here / "teacher.pt")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    monkeypatch.chdir(elsewhere)
    assert parse("--config", "~/config.yaml") == config


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "a" * 300, "..", "x\ny"])
def test_names_do_not_lead_out_of_their_folders(name: str, tmp_path: Path) -> None:
    config = parse("--algo", name, "--agent.name", "aver", "--output", str(tmp_path / "runs"))
    folder = make_folder(config)
    assert folder.parent == tmp_path / "runs"
    assert len(folder.name.encode()) < 255


@pytest.mark.parametrize(("algo", "maps"), [("mmkd", True), ("aekd", True), ("aver", None)])
def test_weightings_that_look_at_maps_have_them_stored_whole(algo: str, maps: bool | None) -> None:
    (config,) = parse_arguments(["--algo", algo, "--distillation.beta", "0"])
    assert config.parts["teachers"].store.maps is maps
