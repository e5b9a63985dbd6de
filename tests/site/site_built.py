"""The built site, docs/_build/html, as the tests read it."""

import functools
import posixpath
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "docs" / "_build"
HTML = BUILD / "html"
NO_LINES = {"search.html", "genindex.html", "py-modindex.html"}         # Sphinx fills these


class Page(HTMLParser):
    """What a page defines, shows and refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.assets, self.alts, self.words = [], [], [], [], 0
        self.inside, self.hidden = 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given[key] for key in ("id", "name") if given.get(key) and (key == "id" or tag == "a")]
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.alts.append(given.get("alt"))
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and given.get("src"):
            self.assets.append(given["src"])
        if tag in ("img", "source") and given.get("srcset"):
            self.assets += [part.split()[0] for part in given["srcset"].split(",")]
        if tag == "link" and given.get("href") and given.get("rel") not in ("canonical", "license"):
            page = given.get("rel") in ("next", "prev", "index", "search")
            (self.links if page else self.assets).append(given["href"])
        self.inside += tag == "article"
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.inside -= tag == "article"
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if self.inside and not self.hidden:
            self.words += len(data.split())


def html_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")
            if "_static" not in path.relative_to(folder).parts}


@functools.cache
def pages() -> dict[str, Page]:
    require()
    return {name: Page(text) for name, text in html_of(HTML).items()}


def require() -> None:
    if not (HTML / "index.html").exists():
        pytest.fail(f"{HTML} is missing: run `python docs/build.py` first", pytrace=False)


def outside(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def broken(pages: dict[str, Page], folder: Path) -> list[tuple[str, str]]:
    """(page, link) of each link or file within the site that leads nowhere, or to an anchor that is not there."""
    found = []
    anchors = {name: set(page.ids) for name, page in pages.items()}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name, page in pages.items():
        for link in {*page.links, *page.assets}:
            if urlsplit(link).scheme or outside(link):
                continue
            path, anchor = urldefrag(link)
            path = unquote(path.split("?")[0])
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if target not in files or (anchor and target in anchors and unquote(anchor) not in anchors[target]):
                found.append((name, link))
    return sorted(found)
