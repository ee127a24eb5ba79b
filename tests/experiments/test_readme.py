"""What README.md shows must run, and what it names must exist."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents import check_agent
from experiments import benchmark, compare, run, train_teachers
from experiments.benchmarks import BENCHMARKS
from experiments.comparison.plan import find_file, load_comparison
from experiments.config import parse_arguments
from mtkd_env.data import DATASETS, ImageData

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(match[1], match[2]) for match in BLOCK.finditer(README)]
PYTHON = [text for language, text in BLOCKS if language == "python"]
# A backslash at the end of a line continues the command.
SHELL = [
    text.replace("\\\n", " ") for language, text in BLOCKS if language in ("sh", "bash", "console")
]

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)|<img[^>]+src=\"([^\"]+)\"")

PROGRAMS = {"experiments/run.py": run, "experiments/train_teachers.py": train_teachers}


def commands(program: str) -> list[list[str]]:
    """The flags of every call of a program, without comments."""
    calls = [shlex.split(line, comments=True) for block in SHELL for line in block.splitlines()]
    return [call[call.index(program) + 1 :] for call in calls if program in call]


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains on 70 of the digits, so that all blocks together take seconds."""
    load = DATASETS["digits"]

    def few() -> ImageData:
        data = load()
        return replace(data, x_train=data.x_train[:70], y_train=data.y_train[:70])

    monkeypatch.setitem(DATASETS, "digits", few)


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Python blocks one after the other, as a reader would."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(PYTHON, start=1):
        exec(compile(text, f"README.md, Python block {number}", "exec"), names)


@pytest.mark.usefixtures("few_digits")
def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(PYTHON) >= 2
    execute(tmp_path, monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_python_blocks_run_on_all_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(tmp_path, monkeypatch)


def check(algo: str) -> None:
    (config,) = parse_arguments(["--algo", algo])
    check_agent(config.agent_name, config.agent.arguments)


def test_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in re.findall(r"^```yaml\n# (\S+\.yaml):(.*?)^```$", README, re.M | re.S):
        (tmp_path / file).write_text(f"# {text}", encoding="utf-8")
    assert commands("experiments/run.py")
    for program in PROGRAMS:
        for flags in commands(program):
            flags = [str(ROOT / flag) if (ROOT / flag).is_file() else flag for flag in flags]
            for config in parse_arguments(flags):
                # `module:Class` stands for the reader's own.
                if ":" not in config.agent_name:
                    check_agent(config.agent_name, config.agent.arguments)


def test_comparisons_are_understood(tmp_path: Path) -> None:
    assert commands("experiments/compare.py")
    for flags in commands("experiments/compare.py"):
        arguments, others = compare.parse(flags)
        chosen = compare.selection(arguments)
        file = find_file(arguments.file)
        assert load_comparison(file, others, chosen, tmp_path, arguments.weights).runs


def test_benchmarks_are_understood() -> None:
    assert commands("experiments/benchmark.py")
    for flags in commands("experiments/benchmark.py"):
        arguments, others = benchmark.parse(flags)
        assert arguments.what in BENCHMARKS
        parse_arguments(others)
        for name in filter(None, (arguments.methods or "").split(",")):
            check(name)


def test_methods_in_comments_are_known() -> None:
    lists = re.findall(r"--algo \S+ +# also ([\w ]+)", "\n".join(SHELL))
    for name in " ".join(lists).split():
        check(name)


def test_methods_of_the_table_are_known() -> None:
    table = README.split("| `--algo` |", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\|((?: `[\w:]+`)+)[^|]*\|", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert {"pg", "ppo", "aver", "none"} <= set(names)
    for name in names:
        check(name)


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([\w-]+)", "\n".join(SHELL)))
    assert {"run", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist() -> None:
    text = BLOCK.sub("", README)
    found = [address or image for address, image in LINK.findall(text)]
    linked = [address for address in found if "://" not in address]
    assert linked
    for address in linked:
        assert (ROOT / address).exists(), address


def test_paths_in_the_text_exist() -> None:
    named = re.findall(r"\b((?:experiments|mtkd_env|agents|tests)/[\w/]+\.\w+)", README)
    for path in named:
        assert (ROOT / path).is_file(), path
