import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import mtkd
from experiments import command
from experiments.command import main
from experiments.verbs import COMMAND, GROUPS, VERBS

ROOT = Path(__file__).parents[2]


def test_the_console_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"][COMMAND].partition(":")
    assert getattr(import_module(module), function) is mtkd.main


def test_every_program_has_a_verb() -> None:
    own = (ROOT / "experiments").glob("*.py")
    transfer = (ROOT / "experiments" / "transfer").glob("*.py")
    programs = {path for path in (*own, *transfer) if "__main__" in path.read_text("utf-8")}
    # The command itself, and the same comparison under another name.
    others = {Path(command.__file__), ROOT / "experiments" / "transfer" / "compare.py"}
    modules = {import_module(module).__file__ for module, _ in VERBS.values()}
    assert {str(path) for path in programs - others} == modules


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_its_program(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: {COMMAND} {verb} " in shown
    assert "python experiments/" not in shown


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_gives_its_program_the_rest_of_the_command_line(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def program(argv: list[str]) -> int:
        seen.append(argv)
        return 130

    monkeypatch.setattr(import_module(VERBS[verb][0]), "main", program)
    assert main([*verb.split(), "here", "--and", "there"]) == 130
    assert seen == [["here", "--and", "there"]]


def test_ctrl_c_during_the_import_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[object] = []

    def imported(_: str) -> SimpleNamespace:
        found.append(signal.getsignal(signal.SIGINT))
        return SimpleNamespace(main=lambda _: found.append(signal.getsignal(signal.SIGINT)) or 0)

    monkeypatch.setattr(command, "import_module", imported)
    assert main(["run"]) == 0
    assert found == [signal.SIG_DFL, signal.default_int_handler]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_all_verbs_are_listed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for verb, (_, about) in VERBS.items():
        assert f"{verb} {about}" in lines


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rest", [[], ["--help"]])
def test_a_first_word_lists_its_verbs(
    group: str, rest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([group, *rest]) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if f"  {verb} " in shown] == [
        verb for verb in VERBS if verb.split()[0] == group
    ]


@pytest.mark.parametrize(
    ("argv", "unknown", "nearest"),
    [
        (["rnu"], "rnu", "run"),
        (["train_teachers", "--seed", "1"], "train_teachers", "train-teachers"),
        (["transfer", "detecton"], "transfer detecton", "transfer detection"),
        (["segmentation"], "segmentation", "transfer segmentation"),
    ],
)
def test_an_unknown_verb_names_the_nearest(
    argv: list[str], unknown: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: unknown verb '{unknown}'; did you mean '{nearest}'?")
    assert said.count("\n") == 1


def test_listing_the_verbs_imports_no_program() -> None:
    code = (
        "import sys; sys.argv = ['mtkd']; from mtkd import main; main();"
        "assert not {'torch', 'numpy', 'mtkd_env'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
