"""The atlas in headless Chromium, where Chromium and its driver are installed; elsewhere these tests are skipped.

Like tests/test_atlas.py: a checker returns complaints, and each is also shown a page with a fault.
"""

import json
import shutil
from pathlib import Path
from urllib.parse import urlparse

import pytest
from test_atlas import edge_page, site  # noqa: F401 - a fixture

from unify.derivations import map_nodes_and_edges
from unify.models.zoo import ZOO

selenium = pytest.importorskip("selenium")
from selenium.common.exceptions import TimeoutException, WebDriverException  # noqa: E402
from selenium.webdriver import ActionChains, Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE, PHONE = 1280, 360
KINDS = {
    "index": "index.html",
    "model": "models/palimpsa.html",
    "edge": "edges/palimpsa--mamba2.html",
    "exact edge": "edges/gla--mamba2.html",
    "compare": "compare.html?a=mamba2&b=palimpsa",
}


class Browser:
    """Headless Chromium: opens pages from files, and collects what it complains about."""

    def __init__(self, binary: str, driver: str):
        options = ChromeOptions()
        options.binary_location = binary
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=Service(driver))

    def open(self, folder: Path, page: str, *, width=WIDE, dark=False, still=True, scripts=True) -> "Browser":
        """Load a page; what it said before is forgotten."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        command = self.driver.execute_cdp_cmd
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "",
        }
        command("Emulation.setEmulatedMedia", {"features": [{"name": x, "value": y} for x, y in features.items()]})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        command("Emulation.setDeviceMetricsOverride", size)
        command("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        name, _, query = page.partition("?")
        self.driver.get((folder / name).as_uri() + ("?" + query if query else ""))
        return self

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def press(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def comes_to(self, end: str, seconds: float = 10) -> bool:
        """Whether it soon shows a loaded page whose address ends so: what starts a navigation does not wait for it."""
        script = "return document.readyState === 'complete' && document.URL.endsWith(arguments[0])"
        wait = WebDriverWait(self.driver, seconds, 0.05, [WebDriverException])  # a script that the old page takes along
        try:
            return wait.until(lambda _: self.run(script, end))
        except TimeoutException:
            return False

    @property
    def focus(self) -> str:
        """What has the focus: a model's name, an edge's two, or an id."""
        return self.run(
            "const x = document.activeElement, d = x.dataset;"
            "return d.model ?? (d.parent ? `${d.parent} ${d.child}` : x.id || x.tagName.toLowerCase())"
        )

    def shown(self, selector: str, name: str) -> set[str]:
        """data-`name` of the elements that are displayed and can be used."""
        script = """
        const used = x => getComputedStyle(x).display !== "none" && x.getAttribute("aria-hidden") !== "true";
        const shown = [...document.querySelectorAll(arguments[0])].filter(used);
        return shown.map(x => x.dataset[arguments[1]]);
        """
        return set(self.run(script, selector, name))


@pytest.fixture(scope="session")
def browser():
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium, or no chromedriver: on Debian, apt-get install chromium chromium-driver")
    found = Browser(binary, driver)
    yield found
    found.driver.quit()


# ---- what a page may be complained about -----------------------------------------------------------------------------


def noise(browser: Browser) -> list[str]:
    """What the console said since the page was opened, requests that failed, and requests that left the machine."""
    faults = [x["message"] for x in browser.driver.get_log("browser")]
    for line in browser.driver.get_log("performance"):
        event = json.loads(line["message"])["message"]
        if event["method"] == "Network.loadingFailed":
            faults.append(f"failed: {event['params'].get('errorText')}")
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            faults += [] if urlparse(url).scheme in ("file", "data") else [f"asked for {url}"]
    return faults


def overflow(browser: Browser) -> list[str]:
    """Elements that make the page itself scroll sideways."""
    script = """
    const page = document.documentElement, wide = page.clientWidth;
    if (page.scrollWidth <= wide) return [];
    const out = x => x.getBoundingClientRect().right > wide + 1 && !x.closest(".scroll");
    return [...document.body.querySelectorAll("*")].filter(out)
      .map(x => x.tagName.toLowerCase() + "." + x.getAttribute("class"));
    """
    return browser.run(script)


def violations(browser: Browser) -> list[str]:
    """What axe-core's rules find."""
    from importlib.util import find_spec

    folder = find_spec("selenium_axe_python").submodule_search_locations[0]
    browser.run((Path(folder) / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    found = browser.driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert found["passes"], "axe looked at nothing"
    return [f"{x['id']}: {x['nodes'][0]['html'][:200]} ({len(x['nodes'])})" for x in found["violations"]]


FAULTY = """<!DOCTYPE html><html lang="en">
<head><title>t</title><meta name="viewport" content="width=device-width"></head>
<body><main><h1>x</h1>{}</main></body></html>"""


@pytest.mark.parametrize(
    ("body", "check", "fault"),
    [
        ("<script>console.error('planted')</script>", noise, "planted"),
        ("<script>planted()</script>", noise, "planted is not defined"),
        ("<script src='gone.js'></script>", noise, "ERR_FILE_NOT_FOUND"),
        ("<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>", noise, "asked for http://127.0.0.1:9/x"),
        ("<p style='width: 400px'>planted</p>", overflow, "p.null"),
        ("<p style='color: #aaa'>planted</p>", violations, "color-contrast"),
        ("<button></button>", violations, "button-name"),
        ("<h4>planted</h4>", violations, "heading-order"),
    ],
)
def test_a_faulty_page_is_seen(browser, tmp_path, body, check, fault):
    (tmp_path / "page.html").write_text(FAULTY.format("<p>fine</p>"))
    assert check(browser.open(tmp_path, "page.html", width=PHONE)) == []
    (tmp_path / "page.html").write_text(FAULTY.format(body))
    found = check(browser.open(tmp_path, "page.html", width=PHONE))
    assert any(fault in x for x in found), found


def test_a_page_that_comes_late_is_awaited_and_one_that_never_comes_is_not_there(browser, tmp_path):
    (tmp_path / "late.html").write_text(FAULTY.format("late"))
    (tmp_path / "page.html").write_text(FAULTY.format("<script>setTimeout(() => location = 'late.html', 500)</script>"))
    assert not browser.open(tmp_path, "page.html").comes_to("late.html", 0.1)
    assert browser.comes_to("late.html")
    assert not browser.comes_to("page.html", 0.3)


def test_every_page_loads_in_silence_and_fits_a_phone(browser, site):  # noqa: F811
    pages = sorted(str(x.relative_to(site)) for x in site.rglob("*.html"))
    faults = []
    for page in pages:
        browser.open(site, page, width=PHONE)
        faults += [f"{page}: {x}" for x in (*noise(browser), *overflow(browser))]
    assert len(pages) > len(ZOO) + 60
    assert faults == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing(browser, site, kind, dark):  # noqa: F811
    assert violations(browser.open(site, KINDS[kind], dark=dark)) == []


@pytest.mark.parametrize("kind", ["index", "compare"])
def test_axe_finds_nothing_on_a_phone(browser, site, kind):  # noqa: F811
    assert violations(browser.open(site, KINDS[kind], width=PHONE)) == []


# ---- clicks ----------------------------------------------------------------------------------------------------------


def test_a_click_on_a_model_opens_it(browser, site):  # noqa: F811
    browser.open(site, "index.html").one('.node[data-model="palimpsa"]').click()
    assert browser.comes_to("models/palimpsa.html")
    assert browser.one("h1").text == "Palimpsa"
    assert browser.run("return document.querySelector('math').getBoundingClientRect().height > 10")
    assert "tl.exp" in browser.one("pre").text


def test_a_click_on_an_edge_opens_it(browser, site):  # noqa: F811
    browser.open(site, "index.html")
    edge = '.edge[data-parent="meta_gla"][data-child="meta_hgrn2"]'
    middle = browser.run(
        "const path = document.querySelector(arguments[0] + ' .reach'); path.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const at = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(path.getScreenCTM()); return [at.x, at.y + 3]",
        edge,
    )
    ActionChains(browser.driver).move_by_offset(*map(round, middle)).click().perform()
    assert browser.comes_to(edge_page("meta_gla", "meta_hgrn2"))
    assert browser.one("h1").text == "meta-GLA → meta-HGRN2"


def test_pages_link_to_each_other(browser, site):  # noqa: F811
    browser.open(site, "models/palimpsa.html")
    browser.one('a[href$="palimpsa--mamba2.html"]').click()
    assert browser.comes_to("palimpsa--mamba2.html")
    assert len(browser.all(".plot circle")) == 21  # three limits at seven eps
    browser.one('main a[href*="compare"]').click()
    assert browser.comes_to("compare.html?a=palimpsa&b=mamba2")
    assert browser.run("return document.title") == "Palimpsa and Mamba-2 · unify atlas"
    browser.one("#result thead a").click()
    assert browser.comes_to("models/palimpsa.html")


# ---- search and filters ----------------------------------------------------------------------------------------------

NODES, ROWS = ".map .node", "#models tr[data-model]"


def test_filters_show_the_models_that_chose_so(browser, site):  # noqa: F811
    browser.open(site, "index.html")
    assert browser.shown(NODES, "model") == set(ZOO)
    browser.one("#filters summary").click()
    Select(browser.one('[name="posterior.curvature"]')).select_by_visible_text("full")
    full = {name for name, m in ZOO.items() if "full" in m.triple.curvatures}
    assert browser.shown(NODES, "model") == browser.shown(ROWS, "model") == full
    Select(browser.one('[name="architecture.forgetting"]')).select_by_visible_text("head")
    both = {name for name in full if ZOO[name].triple.architecture.forgetting == "head"}
    assert full > both > set()
    assert browser.shown(NODES, "model") == browser.shown(ROWS, "model") == both
    drawn = {(e.parent, e.child) for e in map_nodes_and_edges()[1] if {e.parent, e.child} <= both}
    script = "return [...document.querySelectorAll('.edge:not(.off)')].map(x => [x.dataset.parent, x.dataset.child])"
    assert set(map(tuple, browser.run(script))) == drawn
    assert browser.one("#count").text.startswith(f"{len(both)} of {len(ZOO)} models")
    browser.one("#filters [type=reset]").click()
    browser.run("return new Promise(done => setTimeout(done, 50))")
    assert browser.shown(NODES, "model") == set(ZOO)


def test_search_finds_models_and_edges(browser, site):  # noqa: F811
    browser.open(site, "index.html")
    browser.press("/")
    assert browser.focus == "search"
    browser.press("k", "a", "l", "m", "a", "n")
    assert browser.shown(ROWS, "model") == {
        n for n, m in ZOO.items() if "kalman" in f"{n} {m.family} {m.citation} {m.note}".lower()
    }
    assert browser.shown(NODES, "model") == browser.shown(ROWS, "model")
    assert "/" not in browser.one("#search").get_attribute("value")
    browser.press(Keys.ESCAPE)
    assert browser.shown(NODES, "model") == set(ZOO)
    browser.press("/", *"forgetting dominates")
    assert browser.shown("#edges tr[data-parent]", "parent") == {"palimpsa"}
    browser.open(site, "models/gla.html").one("#search").send_keys("rodimus" + Keys.ENTER)
    assert browser.comes_to("index.html?q=rodimus")
    assert browser.shown(ROWS, "model") == {"rodimus"}


# ---- keyboard, themes, motion, scripts -------------------------------------------------------------------------------


def test_the_map_is_walked_by_keyboard(browser, site):  # noqa: F811
    browser.open(site, "index.html")
    assert browser.run("return document.querySelectorAll('svg a[tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('[data-model=\"gated_deltanet\"]').focus()")
    place = "const box = document.activeElement.getBBox(); return [box.x + box.width / 2, box.y + box.height / 2]"
    arrows = {Keys.ARROW_DOWN: (0, 1), Keys.ARROW_RIGHT: (1, 0), Keys.ARROW_UP: (0, -1), Keys.ARROW_LEFT: (-1, 0)}
    for key, (dx, dy) in arrows.items():
        (x, y), before = browser.run(place), browser.focus
        browser.press(key)
        u, v = browser.run(place)
        assert (u - x) * dx + (v - y) * dy > 0, (key, before, browser.focus)
        assert browser.focus in set(ZOO) - {before}
    assert browser.run("return document.activeElement.tabIndex") == 0
    browser.run("document.querySelector('[data-model=\"palimpsa\"]').focus()")
    browser.press("n")
    first = browser.focus
    assert "palimpsa" in first.split()
    browser.press("n")
    assert browser.focus != first
    browser.press("p")
    assert browser.focus == first
    browser.press(Keys.ESCAPE)
    assert browser.focus == "palimpsa"
    browser.press("n", Keys.ENTER)
    assert browser.comes_to(edge_page(*first.split()))


def test_tab_reaches_the_content_and_focus_is_seen(browser, site):  # noqa: F811
    browser.open(site, "models/palimpsa.html")
    browser.press(Keys.TAB)
    assert browser.run("return document.activeElement.className") == "skip"
    assert browser.run("return document.activeElement.getBoundingClientRect().left >= 0")
    browser.press(Keys.ENTER)
    assert browser.focus == "main"
    browser.press(Keys.TAB)
    outline = browser.run("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]")
    assert outline == ["solid", "3px"]


def background(browser: Browser) -> str:
    return browser.run("return getComputedStyle(document.body).backgroundColor")


def test_the_theme_follows_the_system_until_it_is_chosen(browser, site):  # noqa: F811
    light, dark = (background(browser.open(site, "index.html", dark=x)) for x in (False, True))
    assert light != dark
    browser.one("#theme").click()
    assert background(browser) == light
    assert background(browser.open(site, "models/gla.html", dark=True)) == light  # remembered
    browser.run("localStorage.clear()")
    assert background(browser.open(site, "models/gla.html", dark=True)) == dark


def test_nothing_moves_where_motion_is_not_wanted(browser, site):  # noqa: F811
    script = """return [getComputedStyle(document.documentElement).scrollBehavior,
      getComputedStyle(document.querySelector(".node")).transitionDuration]"""
    assert browser.open(site, "index.html", still=True).run(script) == ["auto", "0s"]
    assert browser.open(site, "index.html", still=False).run(script) == ["smooth", "0.15s, 0.15s"]


def test_the_site_reads_without_scripts(browser, site):  # noqa: F811
    browser.open(site, "index.html", scripts=False).one('.node[data-model="gla"]').click()
    assert browser.comes_to("models/gla.html")
    assert not browser.open(site, "index.html", scripts=False).one("#filters").is_displayed()
    assert browser.open(site, "compare.html", scripts=False).one("noscript a").is_displayed()


# ---- two models side by side -----------------------------------------------------------------------------------------


def compared(browser: Browser) -> dict[str, tuple[bool, list[str], int]]:
    """line -> (whether it differs, its two cells, how many terms or phrases are marked)."""
    script = """
    const rows = [...document.querySelectorAll("#result tbody tr")].filter(row => row.cells.length === 3);
    const what = row => [...row.cells[0].childNodes].slice(2).map(x => x.textContent).join("");
    return rows.map(row => [
      row.closest("tbody").rows[0].textContent + " / " + what(row), row.classList.contains("differs"),
      [row.cells[1].textContent, row.cells[2].textContent], row.querySelectorAll("mark, mrow.differs").length,
      row.cells[0].firstChild.textContent])
    """
    rows = browser.run(script)
    assert all((sign == "≠") == differs for _, differs, _, _, sign in rows)
    return {name: (differs, cells, marks) for name, differs, cells, marks, _ in rows}


def test_a_comparison_marks_the_terms_that_differ(browser, site):  # noqa: F811
    rows = compared(browser.open(site, KINDS["compare"]))
    assert not rows["Architecture / forgetting"][0]
    assert rows["Posterior / curvature"] == (
        True,
        ["none: the precision never leaves the prior's", "diagonal: one importance a memory entry"],
        2,
    )
    loss = rows["Free energy / Eq[loss]"]
    assert (loss[0], loss[2]) == (True, 1)  # the curvature's term; the other is the same in both
    assert not rows["Recurrence / predict S̃ⱼᵢ / M̃ⱼᵢ"][0]
    assert rows["Recurrence / observe Ī′ⱼᵢ"][1][0] == "not in it"
    assert rows["Recurrence / read oᵢ"][2] == 2
    different = sum(differs for differs, _, _ in rows.values())
    assert browser.one("#verdict").text == f"Mamba-2 and Palimpsa differ in {different} of {len(rows)} lines."
    assert browser.one("#related a").text == "Palimpsa → Mamba-2, proved"
    assert all((marks > 0) == differs for differs, _, marks in rows.values())
    style = browser.run(
        "const s = getComputedStyle(document.querySelector('#result mrow.differs')); return [s.borderBottomStyle, s.backgroundColor]"
    )
    assert style[0] == "solid"
    assert style[1] != "rgba(0, 0, 0, 0)"
    browser.one("#only input").click()
    assert (
        len(browser.run("return [...document.querySelectorAll('#result tr.alike')].filter(x => x.offsetParent)")) == 0
    )


def test_a_model_beside_itself_differs_in_nothing(browser, site):  # noqa: F811
    rows = compared(browser.open(site, "compare.html?a=kdn&b=kdn"))
    assert len(rows) > 20
    assert not any(differs or marks for differs, _, marks in rows.values())
    assert "the same in all" in browser.one("#verdict").text


def test_a_choice_changes_the_comparison(browser, site):  # noqa: F811
    browser.open(site, "compare.html?a=nobody&b=kda")
    assert browser.run("return document.title").startswith("Mamba-2 and KDA")  # a name that is none is the default
    Select(browser.one("select[name=a]")).select_by_value("gated_deltanet")
    assert browser.comes_to("?a=gated_deltanet&b=kda")
    assert browser.run("return document.title").startswith("Gated DeltaNet and KDA")
    assert compared(browser)["Architecture / forgetting"][0]
