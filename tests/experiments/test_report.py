from pathlib import Path

import pytest

from experiments.report import main, title_of
from run_folders import write_run


def test_a_page_is_written_beside_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "one", "--algo", "pg")
    assert main([str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out == f"{page}: 1 run\n"
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report.html"}


def test_a_page_is_written_where_it_is_wanted(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", "--algo", "pg")
    wanted = tmp_path / "pages" / "mine.html"
    assert main([str(tmp_path / "runs"), "--output", str(wanted)]) == 0
    assert wanted.is_file()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", "--algo", "pg", recorded=True)
    pages = [tmp_path / "first.html", tmp_path / "second.html"]
    for page in pages:
        assert main([str(tmp_path / "runs"), "--output", str(page)]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_comparison_gives_its_title(tmp_path: Path) -> None:
    assert title_of(tmp_path) == f"Runs in {tmp_path.name}"
    (tmp_path / "comparison.md").write_text("# Ways to weight\n\n| method |\n", encoding="utf-8")
    assert title_of(tmp_path) == "Ways to weight"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_mistakes_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert f"{missing}: no such folder" in error_of(capsys, missing)
    assert "expected finished runs, folders with result.json" in error_of(capsys, tmp_path)
    assert "unrecognized arguments: --outptu" in error_of(capsys, tmp_path, "--outptu", "x")
    assert "required: runs" in error_of(capsys)


def test_a_folder_of_unfinished_runs_has_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "one", "--algo", "pg")
    (tmp_path / "one" / "result.json").unlink()
    assert "expected finished runs" in error_of(capsys, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "one", "--algo", "pg")
    (tmp_path / "file").touch()
    message = error_of(capsys, tmp_path, "--output", tmp_path / "file" / "page.html")
    assert "--output: cannot write" in message
