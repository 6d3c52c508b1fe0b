"""What a page says, for the tests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

SPACE = "\N{NO-BREAK SPACE}"


@dataclass
class Page(HTMLParser):
    """The text of a page, its elements, and the texts of its table cells by row."""

    source: str
    text: str = ""
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    in_cell: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(re.sub(r"<style>.*?</style>", "", self.source, flags=re.DOTALL))
        self.text = " ".join(self.text.replace(SPACE, " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def alternatives(self) -> list[str]:
        return [(image["alt"] or "").replace(SPACE, " ") for image in self.attributes("img")]
