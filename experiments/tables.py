"""Tables in files: for programs as CSV, for people in Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """A CSV of rows; its columns are the keys of all of them."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a table in Markdown; a cell stays one, whatever is written in it."""
    texts = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(texts)} |\n"
