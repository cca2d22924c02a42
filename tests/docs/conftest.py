"""The documentation as tests see it: its pages, their headings, links and code blocks."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A Markdown file of the repository."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @property
    def prose(self) -> str:
        """The text without its code blocks."""
        return FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        return [code for found, code in FENCE.findall(self.text) if found == language]

    def commands(self) -> list[str]:
        """Every command line in the page's bash blocks, continued lines joined."""
        lines = [line for block in self.blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line and not line.startswith("#")]

    @property
    def headings(self) -> list[str]:
        return [line.lstrip("#").strip() for line in self.prose.splitlines() if re.match("#{1,6} ", line)]

    @property
    def anchors(self) -> set[str]:
        """The names under which GitHub links to the headings."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in self.headings}

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)


PAGES = [
    Page(path) for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
]
