"""Writes one HTML page about all finished runs below a folder.

mtkd report runs
mtkd report runs/table1 --output table1.html

The page stands alone: it opens from disk, without a network, and prints.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.html_report.page import counted, render
from experiments.html_report.runs import Found, find_runs
from experiments.running.failures import Parser, path_argument, program
from mtkd_env.errors import ConfigError
from mtkd_env.files import write_text

FILE = "report.html"


def title_of(root: Path) -> str:
    """The heading of a comparison, if the folder is one; otherwise the folder's name."""
    try:
        first = (root / "comparison.md").read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        first = ""
    return first.removeprefix("# ").strip() or f"Runs in {root.resolve().name}"


def write_report(root: Path, path: Path) -> Found:
    """Writes the page about the runs below a folder; gives the runs.

    Raises:
        ConfigError: No such folder, no finished run in it, or a page that cannot be written.
    """
    found = find_runs(root)
    page = render(found, title_of(root))
    try:
        write_text(path, page)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror}") from error
    return found


@program("nothing was written")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    parser = Parser("mtkd report", __doc__)
    parser.add_argument(
        "runs", type=path_argument, help="folder with runs in it, or in folders below it"
    )
    parser.add_argument(
        "--output", type=path_argument, help=f"the page (default: {FILE} in the folder)"
    )
    arguments = parser.parse_args(argv)
    path = arguments.output or arguments.runs / FILE
    found = write_report(arguments.runs, path)
    for reason in found.unreadable.values():
        sys.stderr.write(f"left out: {reason}\n")
    sys.stdout.write(f"{path}: {counted(len(found.runs), 'run')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
