"""Every page of the built documentation, in a headless browser: ``make docs-check``."""

import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

HTML = Path(__file__).parents[2] / "docs" / "_build" / "html"
PAGES = sorted(
    path.relative_to(HTML).as_posix()
    for path in HTML.rglob("*.html")
    if "_static" not in path.parts  # templates of the theme
)
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WIDTHS = (1440, 390)  # a desktop, a phone

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not PAGES, reason="docs/_build/html is empty: run make docs"),
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"
    ),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=HTML)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "headless",
        "no-sandbox",  # for root
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


@functools.cache
def ids_of(path):
    return set(re.findall(r'\s(?:id|name)="([^"]*)"', path.read_text(encoding="utf-8")))


def is_broken(link, address):
    """Whether a link within the documentation leads to no file, or to no element in it."""
    if not link.startswith(address):
        return False
    url, fragment = urldefrag(link)
    path = HTML / unquote(urlsplit(url).path).lstrip("/")
    if not path.is_file():
        return True
    return bool(fragment) and path.suffix == ".html" and unquote(fragment) not in ids_of(path)


# What sticks out of the window, though the theme may hide it in a box that scrolls. Code may.
OVERFLOWING = """
const sticksOut = element => element.getBoundingClientRect().right > window.innerWidth + 1;
return [...document.querySelectorAll(".bd-main *, .bd-header *, .bd-footer *")]
  .filter(element => element.checkVisibility() && sticksOut(element) && !element.closest("pre"))
  .map(element => element.outerHTML.slice(0, 200));
"""
LOAD_IMAGES = """
const done = arguments[0];
const images = [...document.images];
for (const image of images) image.loading = "eager";
Promise.allSettled(images.map(image => image.decode())).then(results => done(
  images.filter((_, i) => results[i].status == "rejected").map(image => image.src)));
"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_page_shows_without_faults(browser, address, page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"{address}/{page}")

    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OVERFLOWING) == []
    assert browser.execute_async_script(LOAD_IMAGES) == []
    links = browser.execute_script("return [...document.links].map(link => link.href)")
    assert [link for link in links if is_broken(link, address)] == []
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
