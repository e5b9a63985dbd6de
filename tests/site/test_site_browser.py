"""The built site in a real browser: Chromium, headless, at the widths of a desk and of a phone, light and dark."""

import functools
import http.server
import json
import os
import re
import shutil
import threading
import time

import pytest
from site_built import BUILD, HTML, pages, require

pytestmark = [pytest.mark.site, pytest.mark.filterwarnings("default")]

SCREENSHOTS = BUILD / "screenshots"
WIDTHS = {"desk": (1440, 1000), "phone": (390, 844)}


def chapter() -> str:
    """The first chapter, or the page whose formulas are the most."""
    return next((name for name in sorted(pages()) if re.match(r"docs/course/0\d", name)), "docs/scaling.html")


LOOKED_AT = {"front": lambda: "index.html", "chapter": chapter, "module": lambda: "minidiff/diffusion/gaussian.html",
             "kernel": lambda: "kernels/conv_2_tiles.html", "api": lambda: "api/minidiff.diffusion.html"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    """The site, served from this machine to itself."""
    require()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "install chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                     "--disable-dev-shm-usage", "--hide-scrollbars",
                     f"--user-data-dir={tmp_path_factory.mktemp('user')}",
                     *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.set_page_load_timeout(120)
    found.set_script_timeout(120)
    found.get("about:blank")
    yield found
    found.quit()


def visit(browser, url: str, width: str = "desk", theme: str = "light") -> None:
    """Opens a page, and waits until its formulas are set."""
    across, down = WIDTHS[width]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": across, "height": down, "deviceScaleFactor": 1, "mobile": width == "phone"})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)                                # of the page before
    browser.get(url)
    browser.execute_async_script("""
        const done = arguments[0];
        const formulas = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
        formulas.then(() => document.fonts.ready).then(() => requestAnimationFrame(() => done()));""")


def requested(browser) -> list[str]:
    """The addresses that the browser asked for since the last look."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"]["request"]["url"] for message in messages
            if message["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", LOOKED_AT)
def test_a_page_looks_right(browser, address, page, width, theme):
    visit(browser, f"{address}/{LOOKED_AT[page]()}", width, theme)
    if page in ("module", "kernel"):                        # the picture is of code beside its comment
        top = browser.execute_script("""
            const row = document.querySelector('.row:not(.bare):has(.code pre)');
            window.scrollTo({top: row.getBoundingClientRect().top + scrollY - 80, behavior: 'instant'});
            return row.getBoundingClientRect().top;""")
        assert 0 <= top <= WIDTHS[width][1] / 2
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(SCREENSHOTS / f"{page}-{width}-{theme}.png"))
    assert not browser.get_log("browser"), "messages in the console"
    urls = requested(browser)
    assert urls and not [url for url in urls if not url.startswith((address, "data:", "blob:"))]
    across = WIDTHS[width][0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= across
    lightness = browser.execute_script("""
        const colour = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
        return (colour[0] + colour[1] + colour[2]) / 3 / 255;""")
    assert lightness > 0.9 if theme == "light" else lightness < 0.2
    assert not browser.execute_script(
        "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"), "broken pictures"


def formulas(browser) -> dict:
    return browser.execute_script("""return {
        asked: document.querySelectorAll('.math.notranslate').length,
        set: [...document.querySelectorAll('.math.notranslate mjx-container')]
            .filter(e => e.getBoundingClientRect().width > 0).length,
        wrong: [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.parentElement.outerHTML)};""")


def test_every_formula_is_set(browser, address):
    """On every page that has one."""
    with_formulas = [name for name in sorted(pages())
                     if 'class="math notranslate' in (HTML / name).read_text(encoding="utf-8")]
    assert with_formulas
    for name in with_formulas:
        visit(browser, f"{address}/{name}", "phone")
        found = formulas(browser)
        assert found["asked"] and found["set"] >= found["asked"] and not found["wrong"], (name, found)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= WIDTHS["phone"][0], name


def test_the_code_is_beside_its_comment_on_a_desk_and_below_it_on_a_phone(browser, address):
    sides = """const row = [...document.querySelectorAll('.row:not(.bare)')].find(r => r.querySelector('.code pre'));
               const [a, b] = ['.prose', '.code'].map(s => row.querySelector(s).getBoundingClientRect());
               return [a.right <= b.left, a.bottom <= b.top + 1];"""
    for width, expected in (("desk", [True, False]), ("phone", [False, True])):
        visit(browser, f"{address}/minidiff/diffusion/gaussian.html", width)
        assert browser.execute_script(sides) == expected


def test_an_anchor_leads_to_its_function(browser, address):
    visit(browser, f"{address}/minidiff/diffusion/gaussian.html#q_sample")
    row = browser.execute_script("return document.querySelector('.row:has(> .anchor:target)').innerText")
    assert "def q_sample" in row
    top, deadline = None, time.monotonic() + 30
    while time.monotonic() < deadline and not (top is not None and -100 <= top < 200):      # it scrolls smoothly
        top = browser.execute_script(
            "return document.querySelector(':target').parentElement.getBoundingClientRect().top")
        time.sleep(0.1)
    assert -100 <= top < 200


@pytest.mark.parametrize("word, expected", [
    ("alpha_bar", "schedules"), ("q_sample", "gaussian"), ("guidance", "guidance")])
def test_search_finds_pages(browser, address, word, expected):
    visit(browser, f"{address}/search.html?q={word}")
    deadline, found = time.monotonic() + 60, []
    while time.monotonic() < deadline and not (found and browser.execute_script(
            "return document.querySelectorAll('#search-progress').length == 0 || "
            "/finished|found/i.test(document.querySelector('#search-results').innerText)")):
        found = browser.execute_script(
            "return [...document.querySelectorAll('#search-results ul.search li a')].map(a => a.href)")
        time.sleep(0.2)
    assert len(found) >= 3 and any(expected in url for url in found)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
