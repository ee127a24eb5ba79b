"""Tables in files: for programs as CSV, for people in Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """A CSV of rows; its columns are the keys of all of them."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: headings, then rows; the first column holds texts, others numbers.

    A cell stays one, whatever is written in it.
    """
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = [[" ".join(text.split()).replace("|", r"\|") for text in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [lines[0], rule, *lines[1:]])
