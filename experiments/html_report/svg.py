"""Pictures as parts of an HTML page."""

import re
from dataclasses import dataclass
from io import StringIO

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from experiments.html_report.naming import Setting

# What a file of its own needs, and a part of a page does not; equal images have equal identifiers.
SURPLUS = re.compile(
    r"<metadata>.*?</metadata>|\s+xmlns(:xlink)?=\"[^\"]*\"|\sid=\"image[^\"]*\"", re.DOTALL
)
IDENTIFIER = re.compile(r"(\bid=\"|url\(#|href=\"#)")


@dataclass(frozen=True)
class Key:
    """An entry of a legend; its mark is a line's style, or the character of a symbol."""

    label: str
    colour: str
    mark: str = "solid"


@dataclass(frozen=True)
class Picture:
    """A picture of one setting, and what else is to be said about it."""

    setting: Setting
    svg: Markup
    note: str = ""


def inline(figure: Figure, name: str, description: str) -> Markup:
    """A figure as an `<svg>` element that stands alone in a page with others.

    Args:
        figure: The figure.
        name: Prefix of the identifiers in it; no other picture of the page has it.
        description: What the picture shows, for those who cannot see it.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = SURPLUS.sub("", text[text.index("<svg") :]).replace("xlink:href", "href")
    text = IDENTIFIER.sub(rf"\g<1>{name}-", text)
    label = escape(description)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
