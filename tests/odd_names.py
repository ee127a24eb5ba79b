"""Names that some medium takes for more than text: formulas, markup, HTML, tables, and lengths."""

ODD_NAMES = (
    r"$\frac$",
    "[/]",
    "[bold]b[/bold]",
    ":smile:",
    "_hidden",
    "<b>&amp;",
    "a|b",
    "two\nlines",
    "n" * 300,
)
