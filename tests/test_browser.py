"""What a person really sees: TensorBoard in a browser."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no browser: install Debian's chromium and chromium-driver"
)
FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
)
DEEP = """
const found = [];
(function walk(node) {
  if (node.nodeType === 1) found.push(node);
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
})(document.body);
"""  # every element, in shadow roots too


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1700, 1200)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def tensorboard(short_run):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = ["-m", "tensorboard.main", "--logdir", short_run.parent, "--port", port, "--load_fast=false"]
    server = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as sock:
            if not sock.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    time.sleep(2)  # it reads the run
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def wait_for(browser, script, wanted, seconds=45):
    """Run `script` over DEEP's elements until `wanted` holds of what it returns."""
    end = time.monotonic() + seconds
    while not wanted(answer := browser.execute_script(DEEP + script)):
        assert time.monotonic() < end, answer
        time.sleep(0.3)
    return answer


TEXTS = "return found.map(e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join(' '));"


def test_the_first_page_is_worth_looking_at(browser, tensorboard):
    """Training, validation and chance on one chart for each figure; below them mixtures that can be read."""
    browser.get("about:blank")
    browser.get(tensorboard)
    cards = "return found.filter(e => e.tagName.endsWith('-CARD')).map(e => [e.tagName, e.innerText]);"
    subruns = ("short/chance", "short/train", "short/val")

    def complete(cards):
        charts = [text for tag, text in cards if tag == "SCALAR-CARD"]
        tags = "".join(text.replace("\n", "")[:40] for _, text in cards)
        shown = all(tag in tags for tag in ("curves/loss", "curves/weight error", "mixtures/validation"))
        return shown and all(name in charts[0] for name in subruns)

    wait_for(browser, cards, complete)
    # A picture that is shown nearly as large as it was drawn, in landscape, within the first screen.
    pictures = (
        "return found.filter(e => e.tagName === 'IMG' && e.naturalWidth > 100)"
        ".map(e => [e.width, e.naturalWidth, e.height, e.getBoundingClientRect().top]);"
    )
    shown = wait_for(browser, pictures, lambda found: len(found) >= 2 and found[0][0] > 100)
    for width, natural, height, top in shown[:2]:
        assert width > 0.7 * natural and width > 1.2 * height and top < 1200, shown


def test_scalars_are_shown(browser, tensorboard):
    browser.get("about:blank")
    browser.get(f"{tensorboard}/#scalars")
    wait_for(browser, TEXTS, lambda texts: {"short/train", "short/val", "short/chance"} <= set(texts))
    # Curves that are drawn, each through as many points as there are epochs.
    lines = (
        "return found.filter(e => e.tagName === 'path' && (e.getAttribute('d') || '').split('L').length > 2).length;"
    )
    wait_for(browser, lines, lambda count: count >= 3)


def test_pictures_are_shown(browser, tensorboard):
    browser.get("about:blank")
    browser.get(f"{tensorboard}/#images")
    names = ("mixtures", "neighbours")
    wait_for(browser, TEXTS, lambda texts: all(name in texts for name in names))
    sizes = "return found.filter(e => e.tagName === 'IMG' && e.naturalWidth > 100).map(e => e.naturalHeight);"
    wait_for(browser, sizes, lambda found: len(found) >= 2 and min(found) > 50)


def test_the_run_is_in_the_table_of_settings(browser, tensorboard):
    browser.get("about:blank")
    browser.get(f"{tensorboard}/#hparams")
    wait_for(browser, TEXTS, lambda texts: {"short", "batch_size", "summary/val_loss"} <= set(texts))


@pytest.mark.parametrize("subrun, epoch", [("before", 0), ("after", 3)])
def test_the_projector_has_both_moments(tensorboard, subrun, epoch):
    with urllib.request.urlopen(f"{tensorboard}/data/plugin/projector/info?run=short/{subrun}") as answer:
        (points,) = json.load(answer)["embeddings"]
    assert (points["tensorName"], points["tensorShape"]) == (f"features:0000{epoch}", [218, 1216])
    assert "sprite" in points and "metadataPath" in points
