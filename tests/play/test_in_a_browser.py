"""The page in Chromium: every control does what it says, by mouse and by keyboard, and an error is a sentence.

    pytest -m browser tests/play                            needs the extra `browser`, chromium and chromedriver
    MINIDIFF_SCREENSHOTS=FOLDER                             where screenshots are kept (else build/screenshots)
"""

import base64
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator
from support.play import PACED, TINY, Paced, serving, wait_for

from minidiff import systems

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("few_for_all")]
SHOTS = Path(os.environ.get("MINIDIFF_SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots"))
SD = "stable-diffusion (eps)"
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
           "--hide-scrollbars", "--force-prefers-reduced-motion", "--window-size=1280,900"]


@pytest.fixture(scope="module")
def few_for_all():
    from support import tiny

    from minidiff.data.dataset import DATASETS, DatasetEntry
    from minidiff.play import noise
    DATASETS.register("few", DatasetEntry(lambda folder, split: tiny.digits()))
    yield
    DATASETS.unregister("few")
    noise._data.cache_clear()


@pytest.fixture(scope="module")
def client(offer, few_for_all):
    with serving(offer) as client:
        yield client


def start_chromium(folder: Path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary and driver, "these tests need Debian's packages chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in [*OPTIONS, f"--user-data-dir={folder}"]:
        options.add_argument(option)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chromium")
    driver = start_chromium(folder)
    driver.downloads = folder / "downloads"
    yield driver
    driver.quit()


class Page:
    """The open page, as a person sees it."""

    def __init__(self, driver):
        self.driver = driver

    def __call__(self, name: str):
        return self.driver.find_element("id", name)

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def js(self, code: str, *given):
        return self.driver.execute_script(code, *given)

    def text(self, name: str) -> str:
        return self(name).text

    def fill(self, name: str, text) -> None:
        self(name).clear()
        self(name).send_keys(str(text))

    def choose(self, name: str, value: str) -> None:
        from selenium.webdriver.support.ui import Select
        Select(self(name)).select_by_value(value)

    def press(self, *keys) -> None:
        from selenium.webdriver import ActionChains
        ActionChains(self.driver).send_keys(*keys).perform()

    def drag(self, element, down: int) -> None:
        """By the mouse, in pixels: chromedriver does not find an element of SVG where it has been dragged to."""
        x, y = self.js("const r = arguments[0].getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]",
                       element)
        for kind, at in (("mousePressed", y), ("mouseMoved", y + down / 2), ("mouseMoved", y + down),
                         ("mouseReleased", y + down)):
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {
                "type": kind, "x": x, "y": at, "button": "left", "buttons": 1, "clickCount": 1})

    def slide(self, name: str, value: int) -> None:
        self.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
                self(name), value)

    def draw(self) -> None:
        self("draw-button").click()
        wait_for(lambda: self.text("draw-status") == "Done." or self("draw-error").is_displayed())
        assert not self.text("draw-error")

    def images(self, selector: str) -> list[str]:
        return [image.get_attribute("src") for image in self.all(selector)]

    def settle(self) -> None:
        """Until noise and laws, which begin when they are seen, are there."""
        for name in ("noise", "schedules"):
            self.js("arguments[0].scrollIntoView()", self(name))
        wait_for(lambda: self("noised").is_displayed() and "laws" in self.text("schedule-status"), "noise and laws")
        self.js("scrollTo(0, 0)")

    def shot(self, name: str, width: int = 1280, height: int | None = None) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        command = self.driver.execute_cdp_cmd
        size = {"width": width, "deviceScaleFactor": 1, "mobile": width < 600}
        command("Emulation.setDeviceMetricsOverride", size | {"height": 900})
        height = height or self.js("return document.documentElement.scrollHeight")
        command("Emulation.setDeviceMetricsOverride", size | {"height": height})
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))
        command("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def page(chromium, client):
    chromium.get_log("browser")
    chromium.get(client.url)
    page = Page(chromium)
    wait_for(lambda: page.js("return document.documentElement.dataset.ready"))
    page.choose("noise-data", "few")
    page.choose("a-system", TINY)
    page.fill("a-steps", 4)
    yield page
    said = [entry["message"] for entry in chromium.get_log("browser")]
    # the refusals that a test asks for are logged as failed requests, and nothing else may be
    assert not [line for line in said if "the server responded with a status of 4" not in line], said


# --- drawing ------------------------------------------------------------------------------------------------

def test_a_picture_appears_step_by_step_and_the_slider_goes_back(page):
    page.fill("count", 2)
    page.draw()
    x_t, x0_hat = ".run figure:nth-child(1) img", ".run figure:nth-child(2) img"
    end = page.images(x_t)
    assert len(end) == 2 and page.images(x0_hat) == end
    assert "x_t, picture 1 of 2, the clean picture: a bold seven" in page.all(x_t)[0].get_attribute("alt")
    seen = [end]
    for state in (3, 2, 1, 0):
        page.slide("state-only", state)
        assert page.images(x_t) not in seen
        seen.append(page.images(x_t))
    assert "no guess yet" in page("drawn").text and "0 of 4" in page("drawn").text
    assert page("state-only").get_attribute("aria-valuetext").startswith("0 of 4, t = 49")


@pytest.mark.parametrize("control, value", [("a-scale", 9), ("a-steps", 3), ("seed", 8), ("a-prompt", "three")])
def test_each_setting_changes_the_picture(page, control, value):
    page.fill("count", 1)
    page.draw()
    before = page.images(".run img")[0]
    page.fill(control, value)
    page.draw()
    assert page.images(".run img")[0] != before


def test_the_sampler_and_another_seed(page):
    page.fill("count", 1)
    page.draw()
    pictures = [page.images(".run img")[0]]
    page.choose("a-sampler", "ddpm")
    page.draw()
    pictures.append(page.images(".run img")[0])
    page("another-seed").click()
    assert page("seed").get_attribute("value") != "1"
    page.draw()
    pictures.append(page.images(".run img")[0])
    assert len(set(pictures)) == 3


def test_every_system_shows_the_options_that_it_declares(page):
    about = page.js("return fetch('/api/about').then((a) => a.json())")
    for system in about["systems"]:
        page.choose("a-system", system["key"])
        shown = [e.get_attribute("id") for e in page.all("#settings-a .options input, #settings-a .options select")]
        assert shown == [f"a-{option['name']}" for option in system["options"]]
        assert page("a-prompt").is_enabled() == system["reads_captions"]
        assert page("count").get_attribute("max") == str(system["most"])
    own = {name for name in systems.SYSTEMS
           if name != "paced" and systems.SYSTEMS[name].options() and systems.weights_of(name)}
    assert {system["key"] for system in about["systems"]} >= own


def test_a_negative_prompt_where_the_system_has_one(page):
    page.choose("a-system", SD)
    pictures = []
    for words in ("", "dog"):
        page.fill("a-negative", words)
        page.fill("a-size", "48x40")
        page.fill("a-steps", 2)
        page.draw()
        pictures.append(page.images(".run img"))
    assert pictures[0][0] != pictures[1][0] and "--negative=dog" in page("drawn").text


def test_the_same_noise_under_two_settings(page):
    page("compare").click()
    page.choose("b-system", TINY)
    page.fill("b-steps", 4)
    page.fill("b-scale", 9)
    page.fill("count", 1)
    page.draw()
    first, second = page.all(".run")
    assert [run.find_element("tag name", "h3").text for run in (first, second)] == ["First setting", "Second setting"]
    ends = [run.find_element("tag name", "img").get_attribute("src") for run in (first, second)]
    for name in ("state-first", "state-second"):
        page.slide(name, 0)
    noise = [run.find_element("tag name", "img").get_attribute("src") for run in (first, second)]
    assert ends[0] != ends[1] and noise[0] == noise[1]


def test_stop_stops_the_work(page):
    Paced.gate.clear()
    page.choose("a-system", PACED)
    page.fill("a-steps", 200)
    assert not page("stop-button").is_enabled()
    page("draw-button").click()
    wait_for(lambda: Paced.log and page("stop-button").is_enabled())
    page("stop-button").click()
    wait_for(lambda: page.text("draw-status") == "Stopped." and not page("stop-button").is_enabled())
    time.sleep(0.5)                                         # for the server to learn of it
    Paced.gate.set()
    page.choose("a-system", TINY)
    page.fill("a-steps", 4)
    page.draw()
    assert len(Paced.log) <= 2


def test_a_visitor_who_waits_sees_the_place(page, client):
    Paced.gate.clear()
    client.start("first", visitor="other")
    wait_for(lambda: ("first", 0) in Paced.log)
    page("draw-button").click()
    # two where the page's own noise has not begun yet
    places = ("Waiting: 1 job before this one.", "Waiting: 2 jobs before this one.")
    wait_for(lambda: page.text("draw-status") in places)
    Paced.gate.set()
    wait_for(lambda: page.text("draw-status") == "Done.")


def test_the_files_and_the_command_can_be_saved(page, client):
    page.fill("count", 1)
    page.draw()
    downloads = page.driver.downloads
    for kind, first in (("png", b"\x89PNG"), ("gif", b"GIF89a")):
        page.driver.find_element("link text", f"Save {kind.upper()}").click()
        wait_for(lambda kind=kind: (downloads / f"picture.{kind}").exists())
        assert (downloads / f"picture.{kind}").read_bytes().startswith(first)
    command = page.all(".command code")[0].text
    assert command.startswith("minidiff sample --model") and command.endswith('"a bold seven leaning left"')
    page.all(".command button")[0].click()
    wait_for(lambda: page.all(".command button")[0].text in ("Copied", "Selected"))


@pytest.mark.parametrize("fill, said", [
    ({"a-steps": 0}, "Steps must be a whole number"), ({"a-steps": 99999}, "from -1000 to 1000"),
    ({"seed": -3}, "The seed must be"), ({"count": 99}, "The number of pictures must be"),
    ({"count": ""}, "no whole number"), ({"a-steps": "1.5"}, "takes a value like")])
def test_an_error_is_a_sentence_on_the_page(page, fill, said):
    for name, value in fill.items():
        page.fill(name, value)
    page("draw-button").click()
    wait_for(lambda: page("draw-error").is_displayed())
    line = page.text("draw-error")
    assert said.lower() in line.lower() and line.endswith(".") and "\n" not in line
    assert page("draw-error").get_attribute("role") == "alert"
    for name, value in {"a-steps": 4, "seed": 1, "count": 1}.items():
        page.fill(name, value)
    page.draw()
    assert not page("draw-error").is_displayed()


# --- words --------------------------------------------------------------------------------------------------

def test_words_show_their_maps(page):
    page.fill("a-prompt", "a bold seven")
    page.fill("count", 2)
    page.draw()
    page.choose("attention-picture", "1")
    page("attention-button").click()
    wait_for(lambda: page.all(".word"))
    words = [button.text.split("\n")[0] for button in page.all(".word")]
    assert words == ["<start>", "a", "bold", "seven", "<end>"]
    page.all(".word")[3].click()
    assert [b.get_attribute("aria-pressed") for b in page.all(".word")] == ["false"] * 3 + ["true", "false"]
    assert "seven gets" in page.all("#words .large")[0].text and "mean over 4 steps" in page("words").text
    before = page.images("#words .large img")[1]
    page.slide("state-only", 1)
    page.choose("attention-when", "shown")
    page("attention-button").click()
    wait_for(lambda: "t = " in page("words").text)
    page.all(".word")[3].click()
    assert page.images("#words .large img")[1] != before


def test_a_system_without_maps_says_so(page):
    page.choose("a-system", PACED)
    page.draw()
    page("attention-button").click()
    wait_for(lambda: page("attention-error").is_displayed())
    assert "has no maps" in page.text("attention-error")


# --- noise --------------------------------------------------------------------------------------------------

def test_the_slider_of_t_shows_predicted_and_measured_numbers(page):
    page("noise-button").click()
    wait_for(lambda: page("noised").is_displayed())

    def numbers():
        cells = [cell.text.replace("\u2212", "-") for cell in page.all("#noise-numbers td")]
        rows = zip(cells[::2], cells[1::2], strict=True)
        return [(float(p.split()[0]), float(p.split()[2]), float(m)) for p, m in rows]
    pictures = set()
    for i in (0, 30, 60, 100):
        page.slide("noise-t", i)
        pictures.add(page("noise-x").get_attribute("src"))
        for predicted, error, measured in numbers():
            assert abs(predicted - measured) <= 5.6 * error + 2e-4
    assert len(pictures) == 4 and numbers()[2][0] == pytest.approx(1, abs=1e-3)       # sigma_t at the end
    assert len(page.all("#noise-plot-std circle.dot")) >= 101 and "agree" in page.text("noise-verdict")
    assert "999 of 999" in page("noise-t").get_attribute("aria-valuetext")


def test_noise_under_other_settings_and_of_the_drawing(page):
    page("noise-button").click()
    wait_for(lambda: page("noised").is_displayed())
    before, seen = page("noise-x").get_attribute("src"), set()
    for name, value in (("noise-index", 8), ("noise-seed", 5), ("noise-schedule", "linear"), ("noise-T", 50)):
        page.fill(name, value)
        page("noise-button").click()
        wait_for(lambda: page("noise-x").get_attribute("src") not in seen | {before}, name)
        seen.add(page("noise-x").get_attribute("src"))
    page.fill("count", 1)
    page.draw()
    page.choose("noise-data", page.all("#noise-data option")[-1].get_attribute("value"))
    page("noise-button").click()
    wait_for(lambda: "bold seven leaning left" in page.text("noise-status"))


def test_a_wrong_schedule_is_a_sentence(page):
    page.fill("noise-schedule", "steep")
    page("noise-button").click()
    wait_for(lambda: page("noise-error").is_displayed())
    assert "There is no schedule 'steep'" in page.text("noise-error")


# --- schedules ----------------------------------------------------------------------------------------------

def handles(page):
    return page.all("#curve .handle")


def value(handle) -> float:
    return float(handle.get_attribute("aria-valuenow"))


def open_schedules(page, T: int = 20) -> None:
    page.fill("schedule-T", T)
    page.js("arguments[0].scrollIntoView()", page("schedules"))
    # judged with the T from before, and then with this one: "Judging." may come in between
    wait_for(lambda: "laws are kept" in page.text("schedule-status"), "a schedule that keeps the laws")


def test_a_point_is_dragged_and_the_laws_judge(page):
    open_schedules(page)
    page.settle()                                           # nothing above changes its height any more
    page.js("arguments[0].scrollIntoView({block: 'center'})", page("curve"))
    end = handles(page)[-1]
    path = page.all("#curve .line.one")[0].get_attribute("d")
    page.drag(end, -40)
    assert value(end) > 0.02 and page.all("#curve .line.one")[0].get_attribute("d") != path
    wait_for(lambda: "broken" in page.text("schedule-status"))
    assert "4 ends in noise" in page.text("broken") and "alpha_bar_T <= 0.02" in page.text("broken")
    page.js("arguments[0].scrollIntoView({block: 'center'})", page("curve"))        # the answer has moved the page
    page.drag(end, 60)
    assert value(end) == 0
    wait_for(lambda: "laws are kept" in page.text("schedule-status"))
    assert not page.text("broken")


def test_a_point_is_moved_by_the_keyboard_and_stays_between_its_neighbours(page):
    from selenium.webdriver.common.keys import Keys
    open_schedules(page)
    third = handles(page)[2]
    page.js("arguments[0].focus()", third)
    start = value(third)
    page.press(Keys.ARROW_UP)
    assert value(third) == pytest.approx(start + 0.01, abs=2e-3)
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert value(third) == pytest.approx(start - 0.01, abs=2e-3)
    page.press(Keys.END)
    assert value(third) == pytest.approx(value(handles(page)[1]) - 0.001, abs=1e-3)
    page.press(Keys.HOME)
    assert value(third) == pytest.approx(value(handles(page)[3]) + 0.001, abs=1e-3)
    assert all(a > b for a, b in zip(map(value, handles(page)), map(value, handles(page)[1:]), strict=False))


def test_the_curve_on_the_page_is_the_curve_that_is_judged(page):
    points = [[0, 1], [0.1, 0.97], [0.3, 0.6], [0.35, 0.2], [0.8, 0.15], [1, 0.0]]
    u = np.linspace(0, 1, 101).tolist()
    drawn = page.driver.execute_async_script("""
        const [points, u, done] = arguments;
        const column = (k) => points.map((p) => p[k]);
        import("/static/curve.js").then(({pchip}) => done(u.map(pchip(column(0), column(1)))));
        """, points, u)
    assert np.allclose(drawn, PchipInterpolator(*zip(*points, strict=True))(u), atol=1e-12)


def test_the_other_controls_of_the_schedule(page):
    open_schedules(page)
    before = [value(handle) for handle in handles(page)]
    page.choose("schedule-start", "linear")
    wait_for(lambda: [value(handle) for handle in handles(page)] != before)
    middle = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[499]
    assert value(handles(page)[4]) == pytest.approx(middle, abs=2e-3)
    beside = page.all("#curve .line.two")[0].get_attribute("d")
    page.fill("schedule-beside", "cosine")
    wait_for(lambda: page.all("#curve .line.two")[0].get_attribute("d") != beside)
    page.fill("schedule-beside", "steep")
    wait_for(lambda: "There is no schedule 'steep'" in page.text("schedule-error"))
    page.fill("schedule-beside", "")
    page.fill("schedule-T", "30")
    wait_for(lambda: "laws" in page.text("schedule-status") and not page.text("schedule-error"))
    page.js("arguments[0].open = true", page("laws"))
    assert len(page.all("#law-rows tr")) > 40
    page.fill("schedule-T", "1")
    wait_for(lambda: "T must be a whole number" in page.text("schedule-error"))


# --- the page for everyone ----------------------------------------------------------------------------------

def test_the_whole_page_is_reached_by_tab_in_order_and_draws_by_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys
    names, seen = [], set()
    page.js("document.activeElement.blur(); getSelection().removeAllRanges()")
    page.driver.refresh()                                   # the focus begins at the top again
    wait_for(lambda: page.js("return document.documentElement.dataset.ready"))
    for _ in range(60):
        page.press(Keys.TAB)
        name, outline = page.js("const e = document.activeElement; return [e.id || e.textContent.trim().slice(0, 20), "
                                "getComputedStyle(e).outlineStyle !== 'none' || e.matches('.handle')]")
        if name in seen:
            break
        seen.add(name)
        names.append(name)
        assert outline, f"{name} has the focus and does not show it"
    order = ["Skip to the page", "a-system", "a-prompt", "a-scale", "a-steps", "a-sampler", "seed", "another-seed",
             "count", "compare", "draw-button", "attention-picture", "noise-data", "noise-button", "schedule-T"]
    assert [name for name in names if name in order] == order
    page.choose("a-system", TINY)
    page.fill("a-steps", 4)
    page.js("arguments[0].focus()", page("a-prompt"))
    page.press(Keys.ENTER)
    wait_for(lambda: page.text("draw-status") == "Done.")


def test_the_first_tab_skips_to_the_page(page):
    from selenium.webdriver.common.keys import Keys
    page.js("document.activeElement.blur()")
    page.driver.refresh()
    wait_for(lambda: page.js("return document.documentElement.dataset.ready"))
    page.press(Keys.TAB)
    page.press(Keys.ENTER)
    assert page.js("return document.activeElement.id") == "main"


def test_every_control_has_a_name_and_every_picture_a_text(page):
    """By what a screen reader would be told: Chromium's accessibility tree."""
    page("compare").click()
    page.fill("count", 1)
    page.draw()
    page("attention-button").click()
    wait_for(lambda: page.all(".word"))
    page.settle()
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes
            if not node.get("ignored") and "role" in node]
    wanted = {"textbox", "button", "link", "slider", "spinbutton", "combobox", "checkbox", "image", "img"}
    nameless = [role for role, name in told if role in wanted and not name.strip()]
    assert not nameless
    roles = [role for role, _ in told]
    assert roles.count("slider") >= 13 and {"main", "navigation", "status", "heading"} <= set(roles)
    assert ("slider", "alpha_bar at u = 1.0") in told


CONTRAST = """
    const linear = (v) => (v <= 10 ? v / 3294 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    const lum = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const rgb = (s) => {
      const n = s.match(/[\\d.]+/g).map(Number);
      return n.length > 3 && n[3] === 0 ? null : n.slice(0, 3);
    };
    const behind = (e) => {
      for (; e; e = e.parentElement) {
        const c = rgb(getComputedStyle(e).backgroundColor);
        if (c) return c;
      }
      return [255, 255, 255];
    };
    const low = [];
    for (const e of document.querySelectorAll("body *")) {
      const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
      if (!own || !e.checkVisibility() || e.disabled || e.tagName === "OPTION") continue;
      const s = getComputedStyle(e), svg = e instanceof SVGElement;
      const a = lum(rgb(svg ? s.fill : s.color)), b = lum(behind(e));
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) low.push([e.id || e.className || e.tagName, ratio]);
    }
    return low;"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(page, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page("compare").click()
    page.draw()
    page.settle()
    page.fill("seed", -1)
    page("draw-button").click()
    wait_for(lambda: page("draw-error").is_displayed())
    dark = page.js("return getComputedStyle(document.body).backgroundColor") != "rgb(252, 252, 250)"
    low = page.js(CONTRAST)
    page.shot(f"settings-{scheme}")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert dark == (scheme == "dark") and not low


def test_a_phone_shows_all_without_scrolling_sideways(page):
    page("compare").click()
    page.draw()
    page.settle()
    command = page.driver.execute_cdp_cmd
    command("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True})
    wide = page.js("return document.documentElement.scrollWidth")
    small = page.js("""
        const controls = "button, a.button, select, input[type=text], input[type=number]";
        const low = (e) => e.checkVisibility() && e.getBoundingClientRect().height < 40;
        return [...document.querySelectorAll(controls)].filter(low).map((e) => e.id || e.textContent);""")
    command("Emulation.clearDeviceMetricsOverride", {})
    page.shot("phone", 360)
    assert wide <= 360 and not small


def test_reduced_motion_has_no_smooth_scrolling(page):
    assert page.js("return getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_the_page_asks_its_own_server_alone(page, client):
    page.driver.get_log("performance")
    page.driver.refresh()
    wait_for(lambda: page.js("return document.documentElement.dataset.ready"))
    page.settle()
    asked = re.findall(r'"url":"((?:https?|wss?):[^"]*)"', json.dumps(
        [json.loads(entry["message"]) for entry in page.driver.get_log("performance")]).replace(" ", ""))
    assert len(asked) > 8 and all(url.startswith(client.url) for url in asked)


def test_the_whole_page_in_one_picture(page):
    """Kept for people to look at, with the real model."""
    page.choose("a-system", systems.DEFAULT)
    page.fill("a-steps", 20)
    page.draw()
    page.slide("state-only", 10)
    page("attention-button").click()
    wait_for(lambda: page.all(".word"))
    page.settle()
    page.shot("play")
    assert (SHOTS / "play.png").stat().st_size > 50_000


# --- tabs that end ------------------------------------------------------------------------------------------

def test_a_closed_tab_stops_its_work(page, client):
    Paced.gate.clear()
    page.driver.switch_to.new_window("tab")
    page.driver.get(client.url)
    wait_for(lambda: page.js("return document.documentElement.dataset.ready"))
    page.choose("a-system", PACED)
    page.fill("a-steps", 200)
    page("draw-button").click()
    wait_for(lambda: Paced.log)
    page.driver.close()
    page.driver.switch_to.window(page.driver.window_handles[0])
    time.sleep(0.5)                                         # for the server to learn of it
    Paced.gate.set()
    page.draw()
    assert len(Paced.log) <= 2


def test_the_server_survives_a_killed_browser(client, tmp_path):
    """Chromium's processes are killed in the middle of a drawing, without a word to the server."""
    from selenium.common.exceptions import WebDriverException
    driver = start_chromium(tmp_path / "killed")
    try:
        driver.get(client.url)
        page = Page(driver)
        wait_for(lambda: page.js("return document.documentElement.dataset.ready"))
        Paced.gate.clear()
        page.choose("a-system", PACED)
        page.fill("a-steps", 200)
        page("draw-button").click()
        wait_for(lambda: Paced.log)
        for process in processes_of(str(tmp_path / "killed")):
            os.kill(process, signal.SIGKILL)
    finally:
        try:
            driver.quit()
        except WebDriverException:
            pass
    wait_for(lambda: client.app.queue.running is None or client.app.queue.running.cancelled.is_set())
    Paced.gate.set()
    events = client.draw({"prompt": "after"})
    assert events[-1]["event"] == "done" and len([name for name, _ in Paced.log if name != "after"]) <= 2


def processes_of(folder: str) -> list[int]:
    """Those whose command line names this folder of a browser."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"--user-data-dir={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:                                     # it has ended meanwhile
            continue
    assert found
    return found


def test_a_server_that_is_gone_is_a_sentence(offer, chromium):
    with serving(offer) as client:
        chromium.get(client.url)
        page = Page(chromium)
        wait_for(lambda: page.js("return document.documentElement.dataset.ready"))
    page("draw-button").click()
    wait_for(lambda: page("draw-error").is_displayed())
    assert page.text("draw-error") == "The server does not answer: is minidiff play still running?"
    chromium.get_log("browser")


def test_a_prompt_is_text_and_nothing_else(page):
    words = '<img src=x onerror="document.title=1">'
    page.fill("a-prompt", words)
    page.fill("count", 1)
    page.draw()
    assert page.all(".caption")[0].text.startswith(words) and page.driver.title == "minidiff play"
    picture = page.images(".run img")[0]
    assert base64.b64decode(picture.split(",")[1]).startswith(b"\x89PNG")
