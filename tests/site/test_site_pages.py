"""The built site: no page is empty, every link and anchor leads somewhere, and nothing is fetched from another host."""

import re
from collections import Counter

import pytest
from site_built import HTML, NO_LINES, ROOT, Page, broken, html_of, outside, pages, require

pytestmark = pytest.mark.site


@pytest.fixture
def alt_text(monkeypatch):
    pytest.importorskip("docutils")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    from alt_texts import alt_text
    return alt_text


def test_no_page_is_empty():
    few = {name: page.words for name, page in pages().items() if page.words < 10 and name not in NO_LINES}
    assert not few


def test_every_link_and_anchor_leads_somewhere():
    assert not broken(pages(), HTML)


def test_no_anchor_stands_twice_on_a_page():
    twice = {name: [anchor for anchor, n in Counter(page.ids).items() if n > 1] for name, page in pages().items()}
    assert not {name: anchors for name, anchors in twice.items() if anchors}


def test_no_page_takes_scripts_styles_fonts_or_images_from_another_host():
    found = {name: [asset for asset in page.assets if outside(asset)] for name, page in pages().items()}
    assert not {name: assets for name, assets in found.items() if assets}


def test_no_style_takes_anything_from_another_host():
    require()
    styles = list(HTML.rglob("*.css"))
    found = [(path.name, url) for path in styles
             for url in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", path.read_text())]
    assert styles and not found


def test_search_knows_the_words_of_the_code():
    require()
    index = (HTML / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{word}"' in index for word in ("alpha_bar", "q_sampl", "guidanc"))


def test_every_module_and_kernel_has_a_page_with_its_code():
    sources = [*(ROOT / "minidiff").rglob("*.py"), *(ROOT / "kernels").glob("*.cu*")]
    missing = [str(path) for path in sources
               if path.relative_to(ROOT).with_suffix(".html").as_posix() not in pages()]
    assert len(sources) > 150 and not missing


def test_a_page_of_source_has_all_its_code_and_all_its_comments():
    """Every word of a module stands on its page, in the left column or the right."""
    for name in ("minidiff/diffusion/gaussian", "minidiff/engine/tensor", "minidiff/systems/ddpm"):
        text = re.sub(r"<[^>]+>", " ", html_of(HTML)[f"{name}.html"].split("<article", 1)[1])
        shown = set(re.findall(r"\w+", text.replace("&#x27;", "'")))
        assert set(re.findall(r"\w+", (ROOT / f"{name}.py").read_text())) <= shown


def test_every_picture_of_the_docs_stands_on_a_page():
    shown = {asset.rsplit("/", 1)[-1] for page in pages().values() for asset in page.assets}
    assert {path.name for path in (ROOT / "docs").glob("*.png")} <= shown


def no_texts(alts: list) -> list:
    """The alternative texts that say nothing: none, or the address of the picture."""
    return [alt for alt in alts if not (alt or "").strip() or re.search(r"_images/|\.(png|gif|svg|jpe?g|webp)$", alt)]


def test_every_picture_has_an_alternative_text_and_no_address_in_its_place():
    assert sum(len(page.alts) for page in pages().values()) > 20
    found = {name: no_texts(page.alts) for name, page in pages().items()}
    assert not {name: alts for name, alts in found.items() if alts}


@pytest.mark.parametrize("img, said", [('<img src="a.png">', False), ('<img alt="" src="a.png">', False),
                                       ('<img alt="../_images/a.png" src="a.png">', False),
                                       ('<img alt="a seven" src="a.png">', True)])
def test_a_picture_without_an_alternative_text_is_found(img, said):
    assert bool(no_texts(Page(img).alts)) is not said


def test_the_alternative_text_is_of_the_titles_and_labels_in_the_code(alt_text):
    code = """axes[0].set(title="two moons", xlabel="$x_1$", ylabel="x_2")
axes[1].set_title(f"t = {t}")
axes[1].plot(a, b, label="exact")"""
    assert alt_text("Noise", code, "Here it is") == "Noise: two moons; t = ... (axes: x_1, x_2; curves: exact)"


@pytest.mark.parametrize("paragraphs, said", [
    (["It drowns.", "Here are\nsix digits:"], "Here are six digits"), (["Six. All of them fit."], "All of them fit"),
    (["All fit. Change t. What is seen?"], "All fit"), (["All fit.", "Change t."], "All fit"), ([], "")])
def test_the_sentence_before_a_cell(paragraphs, said, alt_text):
    from alt_texts import sentence_before
    from docutils import nodes
    section, cell = nodes.section(), nodes.container()
    section += [*(nodes.paragraph("", text) for text in paragraphs), cell, nodes.paragraph("", "After it.")]
    assert sentence_before(cell) == said


@pytest.mark.parametrize("code", ["axes.imshow(x_0)", "%matplotlib inline", "axes.set(title=name)", ""])
def test_without_titles_the_alternative_text_is_the_sentence_before(code, alt_text):
    assert alt_text("Noise", code, "Here it is") == "Noise: Here it is"
    assert alt_text("", code, "") and len(alt_text("Noise", code, "very " * 100)) <= 300


def test_every_public_module_has_its_place_in_the_api():
    anchors = {anchor for name, page in pages().items() if name.startswith("api/") for anchor in page.ids}
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
               for path in (ROOT / "minidiff").rglob("*.py") if path.name != "__main__.py"}
    assert {f"module-{module}" for module in modules} <= anchors


@pytest.mark.parametrize("text, found", [
    ('<a href="gone.html">', "gone.html"), ('<a href="#gone">', "#gone"), ('<img src="x.png">', "x.png"),
    ('<a href="page.html#here">', None), ('<a href="https://example.org">', None),
    ('<a href="../page.html">', "../page.html")])
def test_a_broken_link_is_found(text, found, tmp_path):
    (tmp_path / "page.html").write_text(f'<article id="here">{text}</article>')
    pages = {name: Page(html) for name, html in html_of(tmp_path).items()}
    assert broken(pages, tmp_path) == ([("page.html", found)] if found else [])
