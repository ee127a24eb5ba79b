"""What README.md and the pages under docs/ show must run, and what they name must exist."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents import check_agent
from experiments import benchmark, compare
from experiments.benchmarks import BENCHMARKS
from experiments.comparison.plan import Selection, find_file, load_comparison
from experiments.config import algo_layers, parse_arguments
from experiments.verbs import VERBS
from mtkd_env.data import DATASETS, ImageData

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)|<img[^>]+src=\"([^\"]+)\"")


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a page in one language."""
    return [text for name, text in BLOCK.findall(TEXTS[page]) if name == language]


PYTHON = [page for page in TEXTS if blocks(page, "python")]
SHELL = [page for page in TEXTS if blocks(page, "sh")]


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """The verb and the flags of every call of the command `mtkd` on a page, without comments."""
    for block in blocks(page, "sh"):
        # A backslash at the end of a line continues the command.
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["mtkd"]:
                count = 2 if words[1] not in VERBS else 1
                yield " ".join(words[1 : 1 + count]), words[1 + count :]


CALLS = [(page, verb, flags) for page in SHELL for verb, flags in commands(page)]


def calls(*verbs: str) -> list[Any]:
    """The page and flags of every call of one of the verbs, as parameters of a test."""
    return [
        pytest.param((page, flags), id=f"{page}: {verb} {' '.join(flags)}"[:90])
        for page, verb, flags in CALLS
        if verb in verbs
    ]


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains on 70 of the digits, so that all blocks together take seconds."""
    load = DATASETS["digits"]

    def few() -> ImageData:
        data = load()
        return replace(data, x_train=data.x_train[:70], y_train=data.y_train[:70])

    monkeypatch.setitem(DATASETS, "digits", few)


def execute(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Python blocks of a page one after the other, as a reader would."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(blocks(page, "python"), start=1):
        exec(compile(text, f"{page}, Python block {number}", "exec"), names)


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(page, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run_on_all_digits(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(page, tmp_path, monkeypatch)


def test_all_pages_are_in_the_sites_navigation() -> None:
    text = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    named = re.findall(r'"([\w/]+\.md)"', text)
    assert sorted(f"docs/{name}" for name in named) == sorted({*TEXTS} - {"README.md"})


def check(algo: str) -> None:
    """Checks the name of a method; what the shipped files of methods hold is tested elsewhere."""
    agents = [layer.values.get("agent", {}).get("name") for layer in algo_layers(algo)]
    check_agent(agents[-1] or algo if agents else algo, {})


def test_the_first_page_is_short_and_has_code_and_commands() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 120
    assert "README.md" in PYTHON
    assert "run" in [verb for page, verb, _ in CALLS if page == "README.md"]


@pytest.mark.parametrize("page", SHELL)
def test_verbs_exist(page: str) -> None:
    assert {verb for verb, _ in commands(page)} <= VERBS.keys()


@pytest.mark.parametrize("call", calls("run", "train-teachers"))
def test_commands_are_understood(
    call: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, flags = call
    monkeypatch.chdir(tmp_path)
    for file, text in re.findall(r"^```yaml\n# (\S+\.yaml):(.*?)^```$", TEXTS[page], re.M | re.S):
        (tmp_path / file).write_text(f"# {text}", encoding="utf-8")
    flags = [str(ROOT / flag) if (ROOT / flag).is_file() else flag for flag in flags]
    for config in parse_arguments(flags):
        # `module:Class` stands for the reader's own.
        if ":" not in config.agent_name:
            check_agent(config.agent_name, config.agent.arguments)


@pytest.mark.parametrize("call", calls("compare"))
def test_comparisons_are_understood(call: tuple[str, list[str]], tmp_path: Path) -> None:
    arguments, others = compare.parse(call[1])
    chosen = Selection(arguments.methods, arguments.settings, arguments.seeds, arguments.pools)
    file = find_file(arguments.file)
    assert load_comparison(file, others, chosen, tmp_path, arguments.weights).runs


@pytest.mark.parametrize("call", calls("benchmark"))
def test_benchmarks_are_understood(call: tuple[str, list[str]]) -> None:
    arguments, others = benchmark.parse(call[1])
    assert arguments.what in BENCHMARKS
    parse_arguments(others)
    for name in arguments.methods or ():
        check(name)


def test_methods_in_comments_are_known() -> None:
    lists = re.findall(r"--algo \S+ +# also ([\w ]+)", TEXTS["docs/command_line.md"])
    assert lists
    for name in " ".join(lists).split():
        check(name)


def test_methods_of_the_table_are_known() -> None:
    table = TEXTS["docs/command_line.md"].split("| `--algo` |", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\|((?: `[\w:]+`)+)[^|]*\|", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert {"pg", "ppo", "aver", "none"} <= set(names)
    for name in names:
        check(name)


@pytest.mark.parametrize("page", SHELL)
def test_targets_of_make_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([\w-]+)", "\n".join(blocks(page, "sh"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", TEXTS)
def test_linked_files_exist(page: str) -> None:
    found = LINK.findall(BLOCK.sub("", TEXTS[page]))
    for address in (link or image for link, image in found):
        assert "://" in address or ((ROOT / page).parent / address).exists(), address


@pytest.mark.parametrize("page", TEXTS)
def test_paths_in_the_text_exist(page: str) -> None:
    named = re.findall(r"\b((?:experiments|mtkd_env|agents|tests)/[\w/]+\.\w+)", TEXTS[page])
    for path in named:
        assert (ROOT / path).is_file(), path
