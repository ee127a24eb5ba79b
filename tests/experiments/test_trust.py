"""What files may name: nothing is imported or called that is not to be trusted."""

import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.comparison.plan import Comparison, Selection, load_comparison
from experiments.config import ExperimentConfig, parse_arguments
from experiments.experiment import DistillationRun
from experiments.run import planned
from experiments.training import Progress
from experiments.transfer.backbones import export_backbone
from mtkd_env.errors import ConfigError
from mtkd_env.imports import Trust, check_trusted, import_name, trust_of
from mtkd_env.networks import build_network
from mtkd_env.registration import assemble
from mtkd_env.student import load_student, save_student
from mtkd_env.teachers import load_pool_spec
from students import describe

# Leaves a file when it is imported, and another when something of it is called.
SOURCE = """
from pathlib import Path
from stable_baselines3 import PPO
from torch import nn

HERE = Path(__file__).parent
(HERE / "imported").touch()

def called(*args, **kwargs):
    (HERE / "called").touch()

class Net(nn.Module):
    def __init__(self, num_classes=10, in_channels=1):
        super().__init__()
        called()

class Algorithm(PPO):
    pass
"""

NAMES = ("theirs:called", "os:system", "theirs:Net", "theirs:Net@body\nx")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with somebody's module in a folder that Python imports from."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "theirs.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: Any) -> str:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(yaml.safe_dump(content))
    return path


def touched(name: str) -> bool:
    return Path("modules", name).exists()


def student(name: str) -> dict[str, Any]:
    return {"student": {"network": name}}


def teachers(name: str) -> dict[str, Any]:
    return {"teachers": {"teachers": [{"network": name}]}}


VALUES: dict[str, Callable[[str], dict[str, Any]]] = {
    "student": student,
    "a dotted key": lambda name: {"student.network": name},
    "a teacher": teachers,
    "a method": lambda name: {"algo": name},
    "an agent": lambda name: {"agent": {"name": name}},
    "an agent's argument": lambda name: {"agent": {"arguments": {"policy": name}}},
    "a class of an option": lambda name: {"student": {"class_path": name.replace(":", ".")}},
    "an option by its class": lambda name: {"teachers": name.replace(":", ".")},
    "a teacher by its class": lambda name: {"teachers": {"teachers": [name.replace(":", ".")]}},
}


def run_of(values: dict[str, Any], *flags: str) -> list[tuple[ExperimentConfig, Path | None]]:
    return planned(["--config", write("config.yaml", values), *flags])


def resumed(values: dict[str, Any], *flags: str) -> list[tuple[ExperimentConfig, Path | None]]:
    (config,) = parse_arguments([])
    write("run/config.yaml", yaml.safe_load(config.to_yaml()) | values)
    return planned(["--resume", "run", *flags])


def recipe_of(values: dict[str, Any], *flags: str) -> list[tuple[ExperimentConfig, Path | None]]:
    return planned(["--recipe", write("recipe.yaml", values), *flags])


def pool_of(values: dict[str, Any], *flags: str) -> list[tuple[ExperimentConfig, Path | None]]:
    """The teachers of the values in a file of their own, and the rest in another."""
    if not isinstance(pool := values.get("teachers", {"teachers": [{"network": "resnet8"}]}), str):
        pool = write("pool.yaml", pool)
    return run_of({**values, "teachers": pool}, *flags)


def compared(values: dict[str, Any], *flags: str) -> Comparison:
    methods = {"first": {"algo": values.pop("algo", "aver"), **values}}
    path = write("comparison.yaml", {"methods": methods})
    return load_comparison(Path(path), flags, Selection(), Path("out"))


FILES: dict[str, Callable[..., Any]] = {
    "--config": run_of,
    "--resume": resumed,
    "--recipe": recipe_of,
    "pool": pool_of,
    "comparison": compared,
}


# Every place in every file meets one name, and every name all files and all places.
MET = set(zip(product(FILES, VALUES), cycle(NAMES)))
EVERYWHERE = [
    pytest.param(*place, name, marks=() if (place, name) in MET else pytest.mark.slow)
    for place, name in product(product(FILES, VALUES), NAMES)
]


@pytest.mark.parametrize(("file", "where", "name"), EVERYWHERE)
def test_what_a_file_names_is_neither_imported_nor_called(file: str, where: str, name: str) -> None:
    values = VALUES[where](name)
    if (file, where) == ("--recipe", "a method"):
        return  # A recipe's method does not count.
    with pytest.raises(ConfigError) as error:
        FILES[file](values)
    message = str(error.value)
    assert "\n" not in message.replace(name, "")
    assert not touched("imported")
    assert not touched("called")
    if "class" not in where:
        assert "only with --trust" in message


@pytest.mark.parametrize("file", FILES)
def test_trust_lets_a_file_name_what_is_of_the_expected_kind(file: str) -> None:
    FILES[file]({**student("theirs:Net@body"), "agent": {"name": "theirs:Algorithm"}}, "--trust")
    with pytest.raises(ConfigError, match=r"'os:system' is not a class of nn\.Module"):
        FILES[file](teachers("os:system"), "--trust")
    assert not touched("called")


@pytest.mark.parametrize("file", ["--config", "--resume", "comparison"])
def test_a_file_may_name_what_a_flag_says_as_well(file: str) -> None:
    FILES[file](student("theirs:Net@body"), "--student.network=theirs:Net@body")


def test_the_configuration_of_another_run_is_compared_and_not_imported() -> None:
    (config,) = parse_arguments(["--student.network=resnet8"])
    written = yaml.safe_load(config.to_yaml()) | teachers("theirs:Net@body")
    write("run/config.yaml", {**written, **student("theirs:Net@body")})
    with pytest.raises(ConfigError, match=r"student\.network resnet8 instead of theirs:Net@body"):
        DistillationRun(config, Progress()).check_same(Path("run"))
    assert not touched("imported")
    (same,) = parse_arguments(["--student.network=theirs:Net@body"])
    write("run/config.yaml", yaml.safe_load(same.to_yaml()))
    DistillationRun(same, Progress()).check_same(Path("run"))


def test_flags_may_name_anything_of_the_expected_kind() -> None:
    parse_arguments(
        ["--student.network=theirs:Net@body", "--teachers={teachers: [{network: theirs:Net@body}]}"]
    )
    (named,) = parse_arguments(["--algo", "theirs:Algorithm"])
    named.check_agent()
    assert not touched("called")


def test_what_belongs_to_the_project_or_to_what_it_depends_on_needs_no_trust() -> None:
    names = ("torchvision:resnet18", "timm:deit_tiny_patch16_224", "stable_baselines3:PPO")
    with Trust().applied():
        check_trusted([*names, "mtkd_env.networks.resnet:ResNet", "torch.nn:Linear@weight"])
        for name in ("pytest:main", "os:system", "torch_:x", "subprocess:run", "users:Net@x"):
            with pytest.raises(ConfigError, match=rf"^place\.0: '{name}' is not of this project"):
                check_trusted({"place": [name]})


@pytest.mark.parametrize("text", ["cuda:0", "C:/images", "a title: with more", "12:30", "x"])
def test_texts_that_name_no_object_are_texts(text: str) -> None:
    with Trust().applied():
        check_trusted({"key": text})


def test_a_file_trusts_no_file_of_a_known_name() -> None:
    with Trust().applied(), pytest.raises(ConfigError, match=r"key: 'timm\.py:Net' is not of this"):
        check_trusted({"key": "timm.py:Net"})
    with trust_of(["--student.network=modules/theirs.py:Net@body"]).applied():
        assert import_name(f"{Path.cwd()}/modules/theirs.py:Net", callable, "x").__name__ == "Net"


def test_a_module_may_be_in_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[1:])
    Path("at_hand.py").write_text("def here(): ...")
    assert import_name("at_hand:here", callable, "callable").__name__ == "here"


def test_a_command_line_trusts_the_names_in_it() -> None:
    argv = ["--algo", "my.agents:A", "--teachers={teachers: [{network: 'b:C@d'}]}", "--seed=1"]
    assert trust_of(argv) == Trust(frozenset({"my.agents:A", "b:C"}))
    assert trust_of(["--trust", *argv]) == Trust(None)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("os:system", {"command": "touch modules/called"}),
        ("subprocess:run", {"args": ["touch", "modules/called"]}),
        ("torch.hub:load", {"repo_or_dir": "modules", "model": "x"}),
        ("timm.models:create_model", {"model_name": "resnet18"}),
        ("timm.models._builder:load_pretrained", {"model": "x"}),
        ("theirs:called", {}),
        ("builtins:exec", {"source": "1"}),
    ],
)
def test_the_kind_is_checked_before_anything_is_called(
    name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is not a class of nn.Module or a function"):
        build_network(name, num_classes=10, **arguments)
    assert not touched("called")


def test_a_name_is_not_called_to_be_imported() -> None:
    assert import_name("theirs:called", callable, "callable").__name__ == "called"
    assert touched("imported")
    assert not touched("called")


@pytest.mark.parametrize("load", [load_pool_spec, lambda path: assemble(teachers=path)])
def test_a_pool_file_is_a_file_in_python_too(load: Callable[[str], Any]) -> None:
    path = write("pool.yaml", {"teachers": [{"network": "theirs:Net@body"}]})
    with pytest.raises(ConfigError, match=r"pool.yaml: teachers.0.network: .* with --trust"):
        load(path)
    assert not touched("imported")
    assert load_pool_spec(path, trust=True).teachers[0].network == "theirs:Net@body"


@pytest.mark.parametrize(
    "load", [load_student, lambda run, trust=False: export_backbone(run, Path("out"), trust=trust)]
)
def test_a_student_imports_nothing_without_trust(load: Callable[..., Any]) -> None:
    save_student(Path("run"), build_network("resnet8", num_classes=2), describe("theirs:Net@body"))
    with pytest.raises(ConfigError, match="only with --trust"):
        load(Path("run"))
    assert not touched("imported")
    with pytest.raises(ConfigError, match="no layer 'body'"):
        load(Path("run"), trust=True)
    assert touched("imported")


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "pretrained_cfg"])
def test_timm_reads_no_weights_that_an_argument_names(argument: str) -> None:
    pytest.importorskip("timm")
    work = partial(build_network, "timm:resnet18", num_classes=3, **{argument: "x.pth"})
    with pytest.raises(ConfigError, match=rf"timm:resnet18\.{argument}: cannot be given"):
        work()
