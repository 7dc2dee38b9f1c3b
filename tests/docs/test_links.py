"""Every relative link of the Markdown files leads to a file, and every anchor to a heading."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks_of, markdown_pages

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
ELSEWHERE = ("http://", "https://", "mailto:")


def links(text: str) -> list[str]:
    return [link for link in LINK.findall(CODE.sub("", text)) if not link.startswith(ELSEWHERE)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ +(.+)$", CODE.sub("", text) + "\n", re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    found = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        missing = not target.exists() or not target.is_relative_to(ROOT)
        if missing or (anchor and target.suffix == ".md" and anchor not in anchors(target.read_text("utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", markdown_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_linked_files_are_tracked() -> None:
    tracked = set(
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    )
    for page in markdown_pages():
        for link in links(page.read_text(encoding="utf-8")):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.is_file():
                assert str(target.relative_to(ROOT)) in tracked, f"{page}: {link}"


@pytest.mark.parametrize("link", ["nowhere.md", "../../outside.md", "#no-such-heading", "README.md#no-such-heading"])
def test_a_broken_link_is_found(link: str) -> None:
    assert broken(ROOT / "README.md", f"[text]({link})") == [link]


@pytest.mark.parametrize("page", markdown_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_language(page: Path) -> None:
    assert [block.place for block in blocks_of(page) if not block.language] == []


def test_links_inside_code_are_not_links() -> None:
    assert links("`[a](b.md)`\n```\n[c](d.md)\n```\n[e](f.md)") == ["f.md"]
