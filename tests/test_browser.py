"""What a person really sees: TensorBoard and the report in a browser."""

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
def run(tmp_path_factory, cache):
    """A short run validated on its own question as well as on the fixed one: its folder."""
    from conftest import ROOT

    folder = tmp_path_factory.mktemp("runs") / "short"
    words = ["--epochs", 3, "--size", 16, "--batch-size", 128, "--data-dir", cache, "--out", folder]
    subprocess.run([sys.executable, ROOT / "train_pretext.py", *map(str, words)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1400, 1200)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def tensorboard(run):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = ["-m", "tensorboard.main", "--logdir", run.parent, "--port", port, "--load_fast=false"]
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


def test_scalars_are_shown(browser, tensorboard):
    browser.get("about:blank")
    browser.get(f"{tensorboard}/#scalars")
    wait_for(browser, TEXTS, lambda texts: {"loss/train", "loss/val", "loss/floor"} <= set(texts))
    # Curves that are drawn, each through as many points as there are epochs.
    lines = (
        "return found.filter(e => e.tagName === 'path' && (e.getAttribute('d') || '').split('L').length > 2).length;"
    )
    wait_for(browser, lines, lambda count: count >= 2)


def test_the_main_charts_come_first(browser, tensorboard):
    browser.get("about:blank")
    browser.get(f"{tensorboard}/#custom_scalars")
    wanted = ("loss", "sources named right", "weight error", "sources named right on the fixed question")
    wait_for(browser, TEXTS, lambda texts: all(title in texts for title in wanted))


def test_pictures_are_shown(browser, tensorboard):
    browser.get("about:blank")
    browser.get(f"{tensorboard}/#images")
    names = ("1 validation", "2 hardest of validation", "3 nearest neighbours", "4 first layer")
    wait_for(browser, TEXTS, lambda texts: all(name in texts for name in names))
    sizes = "return found.filter(e => e.tagName === 'IMG' && e.naturalWidth > 100).map(e => e.naturalHeight);"
    wait_for(browser, sizes, lambda found: len(found) >= 2 and min(found) > 50)


def test_the_run_is_in_the_table_of_settings(browser, tensorboard):
    browser.get("about:blank")
    browser.get(f"{tensorboard}/#hparams")
    wait_for(browser, TEXTS, lambda texts: {"short", "batch_size", "summary/val_loss"} <= set(texts))


def test_the_projector_has_both_moments(tensorboard):
    with urllib.request.urlopen(f"{tensorboard}/data/plugin/projector/info?run=short") as answer:
        embeddings = json.load(answer)["embeddings"]
    assert [(e["tensorName"], e["tensorShape"]) for e in embeddings] == [
        ("features-0:00000", [218, 512]),
        ("features-3:00003", [218, 512]),
    ]
    assert all("sprite" in e and "metadataPath" in e for e in embeddings)


@pytest.mark.parametrize("width", [1200, 390])  # a screen, a phone
def test_the_report_stands_alone(browser, run, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(f"file://{run}/report.html")
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        sizes = browser.execute_script("return [...document.images].map(e => e.naturalWidth)")
        assert len(sizes) == 2 and min(sizes) > 200  # the mixtures before and after
        points = browser.execute_script(
            "return [...document.querySelectorAll('polyline')].map(e => e.points.numberOfItems)"
        )
        assert len(points) >= 12 and set(points) == {3}  # every curve has a point for each epoch
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [name for name in loaded if not name.startswith("data:")] == []
        assert "sources named right" in browser.execute_script("return document.body.innerText")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
