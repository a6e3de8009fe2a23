"""The documentation names only files, modules and headings that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.serving.registry import PROJECT

PAGES = sorted(
    [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("tiny/*.md")],
    key=lambda page: page.relative_to(PROJECT).as_posix(),
)
NAMED = re.compile(r"(?<![\w./-])((?:lib|training|tests|bench|tiny|script|docs|\.ci)/[\w./*-]*[\w*])")
MODULE = re.compile(r"-m ((?:lib|training|tiny|bench)(?:\.\w+)*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def page_name(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for line in CODE.sub("", page.read_text()).splitlines():
        if title := re.match(r"#+ (.+)", line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title[1]).lower()
            found.add(re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-"))
    return found


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_path_and_module_named_in_a_page_exists(page):
    text = page.read_text()
    paths = [path for path in NAMED.findall(text) if not any(PROJECT.glob(path))]
    modules = [
        name
        for name in MODULE.findall(text)
        if not (PROJECT / name.replace(".", "/")).with_suffix(".py").exists()
        and not (PROJECT / name.replace(".", "/") / "__main__.py").exists()
    ]
    assert paths + modules == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    assert list(broken_links(page)) == []


def test_every_page_is_in_the_index():
    index = (PROJECT / "docs" / "README.md").read_text()
    pages = {page.name for page in PROJECT.glob("docs/*.md")} - {"README.md"}
    assert sorted(name for name in pages if f"({name})" not in index) == []
