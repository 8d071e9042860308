"""The page on a model: what it shows, and a browser that clicks through it.

``SCREENSHOTS=docs/images python -m pytest tests/apps/test_explorer.py -m slow`` renews the pictures in the docs.
"""

import argparse
import io
import os
import shutil
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import torchcdm
from torchcdm.apps.explorer import COMBINED, Explorer, page, serve
from torchcdm.cli import scoring
from torchcdm.errors import UserError
from torchcdm.training.checkpoint import ModelInfo, load

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def explorer(name):
    model = load(name)
    source = model.info.read_source(model)
    return Explorer(model, *(split.tensors(100)[0].float() for split in (source.validation, source.test)))


@pytest.fixture(scope="module")
def digits():
    return explorer("zoo:digits")


def test_without_a_test_split_examples_are_normal_data(monkeypatch):
    read, shown = ModelInfo.read_source, []

    def without_test(info, model):
        source = read(info, model)
        return replace(source, test=source.test.select(torch.arange(0)))

    monkeypatch.setattr(ModelInfo, "read_source", without_test)
    monkeypatch.setattr(scoring, "serve", lambda *_: "address")
    page = SimpleNamespace(block_thread=int)
    monkeypatch.setattr(scoring, "page", lambda explorer, _: shown.append(explorer) or page)
    scoring.explore(argparse.Namespace(model="zoo:two-moons", device="cpu", reference=None, port=None))
    assert len(shown[0].examples) and torch.equal(shown[0].examples, shown[0].reference)


@pytest.fixture(scope="module")
def classes():
    return explorer("zoo:digits-conditional")


@pytest.fixture(scope="module")
def wines():
    return explorer("zoo:table-example")


def percentile(words):
    return float(words.split("**")[1].split()[0])


def test_what_is_spoiled_is_odd_and_its_place_is_red(digits):
    x = digits.examples[:1].clone()
    x[:, :, :3, :3] = 16 - x[:, :, :3, :3]
    words, where = digits.oddness(x)
    assert percentile(words) > 90
    red = (where[..., 0].astype(int) - where[..., 1]).reshape(8, where.shape[0] // 8, 8, -1).mean((1, 3))
    assert red[:3, :3].mean() > 5 * red[4:, 4:].mean()


def test_the_column_that_makes_a_row_odd_has_the_longest_bar(wines):
    row = wines.cells(wines.examples[:1])[0]
    row[4] = 10 * row[4]
    words, figure = wines.oddness(wines.row([row]))
    bars = figure.axes[0].patches
    assert percentile(words) == 90  # nine normal rows are beneath
    assert figure.axes[0].get_yticklabels()[-1].get_text() == wines.columns[4]
    assert bars[-1].get_width() == max(bar.get_width() for bar in bars)


@pytest.mark.parametrize("name", ["digits", "wines"])
def test_noise_grows_with_the_level_until_little_is_left(name, request):
    shown = request.getfixturevalue(name)
    x, last = shown.examples, shown.model.schedule.T
    pairs = [shown.noised(x, t) for t in (0, 10, 30, last)]
    noisy, clean = ([float((part - x).square().mean()) for part in parts] for parts in zip(*pairs, strict=True))
    assert noisy[0] < 1e-6 < noisy[1] < noisy[2] < noisy[3] and clean[0] < 1e-6
    # Of noise alone little but the middle of all data can be made.
    assert pairs[-1][1].std(0).mean() < 0.6 * x.std(0).mean()


def test_samples_are_those_of_the_seed(digits):
    x = digits.samples(5, steps=10, seed=3)
    assert x.shape == (5, 1, 8, 8) and torch.equal(x, digits.samples(5, steps=10, seed=3))
    assert not torch.equal(x, digits.samples(5, steps=10, seed=4))


def test_samples_are_of_the_classes_that_were_chosen(classes):
    def odds(x):
        """log p(class | x) of digits, (n, 10)."""
        with torch.no_grad():
            log_p = classes.model.class_log_prob_levels(classes.model.transform(x.float()))[:, :, 5]
        return log_p.log_softmax(1)

    ways = list(COMBINED)
    assert ways[0] == "one of these"  # as the page shows it first
    for chosen, how in ((["3"], ways[0]), (["3"], ways[1]), (list("012456789"), ways[2])):
        assert (odds(classes.samples(6, chosen, how, steps=12)).argmax(1) == 3).double().mean() > 0.8
    one, both = (odds(classes.samples(8, ["3", "8"], how, moves=2, steps=12)) for how in ways[:2])
    assert torch.isin(one.argmax(1), torch.tensor([3, 8])).double().mean() > 0.8
    # The less likely of the two is likelier where samples are to be both.
    assert both[:, [3, 8]].amin(1).mean() > one[:, [3, 8]].amin(1).mean() + 1


def test_samples_of_a_table_are_rows_of_it(wines):
    rows = wines.cells(wines.samples(4, steps=10))
    assert len(rows) == 4 and all(len(row) == 13 for row in rows)
    assert torch.allclose(wines.row([rows[0]]), wines.samples(4, steps=10)[:1], rtol=0.02)  # as many decimals


def test_texts_and_dates_of_a_table_are_shown_and_typed(tmp_path):
    frame = pd.DataFrame({
        "kind": ["red", "green"] * 40, "day": pd.date_range("2020-01-01", periods=80), "size": np.arange(80) ** 1.5,
        "ok": [True, False] * 40,
    })  # fmt: skip
    torchcdm.fit(frame, preset="table", steps=2, out=tmp_path / "run", progress=False, device="cpu",
                 sampling={"n": 0})  # fmt: skip
    model = load(tmp_path / "run")
    x = model.transform.table.encode(frame).x.float()
    shown = Explorer(model, x, x)
    rows = shown.cells(shown.examples[:2])
    assert rows[0][0] in ("red", "green") and rows[0][1].startswith("2020-")
    assert torch.equal(shown.row([rows[0]])[:, :1], shown.examples[:1, :1])
    with pytest.raises(UserError, match="'kind'.*blue"):
        shown.row([["blue", *rows[0][1:]]])
    assert torch.equal(shown.row(np.array(rows, dtype=object)), shown.row([rows[0]])), "a row that the page added"


def test_a_drawing_becomes_an_image_of_the_model(digits):
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:, :32, 3] = 255
    x = digits.drawn([layer])
    assert x.shape == (1, 1, 8, 8) and (x[..., :3] == 16).all() and (x[..., 5:] == 0).all()
    with pytest.raises(UserError, match="nothing is drawn"):
        digits.drawn([np.zeros_like(layer)])


def test_mistakes_are_named(digits, wines, tmp_path):
    with pytest.raises(UserError, match="'alcohol'.*'strong'"):
        wines.row([["strong", *wines.cells(wines.examples[:1])[0][1:]]])
    Image.new("L", (5, 5)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"^small.png: images of 5 x 5 pixels"):
        digits.uploaded(str(tmp_path / "small.png"))


# --- the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def browse():
    """Opens the page of a model in headless Chromium; afterwards no other host must have been asked for anything."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    hosts, served = set(), []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def opened(shown, title):
            served.append(page(shown, title))
            window = browser.new_page(viewport={"width": 1100, "height": 950})
            window.set_default_timeout(90_000)
            window.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
            window.goto(serve(served[-1]))
            window.wait_for_selector("#words strong")
            return window

        yield opened
        browser.close()
    for blocks in served:
        blocks.close()
    assert hosts - {""} == {"127.0.0.1"}


def keep(window, name):
    """A screenshot, where they are wanted."""
    if folder := os.environ.get("SCREENSHOTS"):
        window.wait_for_timeout(1500)
        window.screenshot(path=str(Path(folder) / f"explore-{name}.png"))


def changed(window, selector, before):
    """The text of an element, once its content is another."""
    window.wait_for_function("([s, b]) => document.querySelector(s)?.outerHTML !== b", arg=[selector, before])
    return window.locator(selector).first.inner_text()


@pytest.mark.slow
@needs_browser
def test_a_browser_clicks_through_a_page_of_images(browse, digits, tmp_path):
    window = browse(digits, "zoo:digits")
    before = window.locator("#words p").evaluate("e => e.outerHTML")
    keep(window, "digits")
    window.locator("#example input[type=number]").fill("5")
    window.locator("#example input[type=number]").press("Enter")
    assert "normal inputs" in changed(window, "#words p", before)

    image = digits.examples[7, 0].numpy() * 255 / 16
    image[:3, :3] = 255 - image[:3, :3]
    Image.fromarray(image.round().astype(np.uint8)).save(tmp_path / "spoiled.png")
    (tmp_path / "words.txt").write_text("no image")
    before = window.locator("#words p").evaluate("e => e.outerHTML")
    window.get_by_role("tab", name="Upload").click()
    window.locator("#upload input[type=file]").set_input_files(tmp_path / "words.txt")
    message = window.get_by_text("words.txt: vectors of 1; the model takes images")
    message.wait_for()
    keep(window, "mistake")
    window.reload()
    window.wait_for_selector("#words strong")
    window.get_by_role("tab", name="Upload").click()
    before = window.locator("#words p").evaluate("e => e.outerHTML")
    window.locator("#upload input[type=file]").set_input_files(tmp_path / "spoiled.png")
    expected = digits.oddness(digits.uploaded(str(tmp_path / "spoiled.png")))[0]
    assert changed(window, "#words p", before) == expected.replace("**", "")
    keep(window, "spoiled")

    window.get_by_role("tab", name="Draw").click()
    pad = window.locator("#pad canvas").first
    pad.wait_for()
    window.locator("#pad button[aria-label=Brush]").first.click()
    box = pad.bounding_box()
    window.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.3 * box["height"])
    window.mouse.down()
    window.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.7 * box["height"], steps=10)
    window.mouse.up()
    before = window.locator("#words p").evaluate("e => e.outerHTML")
    window.locator("#ink").click()
    assert "normal inputs" in changed(window, "#words p", before)

    window.get_by_role("tab", name="Noise").click()
    window.wait_for_selector("#noisy img")
    before = window.locator("#noisy img").evaluate("e => e.outerHTML")
    window.locator("#level input[type=number]").fill("40")
    window.locator("#level input[type=number]").press("Enter")
    changed(window, "#noisy img", before)
    keep(window, "noise")
    window.get_by_role("tab", name="Sample").click()
    window.locator("#steps input[type=number]").fill("10")
    window.locator("#sample").click()
    window.wait_for_selector("#samples img")
    keep(window, "samples")


@pytest.mark.slow
@needs_browser
def test_a_browser_composes_classes(browse, classes):
    window = browse(classes, "zoo:digits-conditional")
    window.get_by_role("tab", name="Sample").click()
    for label in ("3", "8"):
        window.locator("#classes").get_by_label(label, exact=True).check()
    window.locator("#how").get_by_label("all of these at once").check()
    for name, value in (("count", "9"), ("steps", "20"), ("moves", "4")):
        window.locator(f"#{name} input[type=number]").fill(value)
        window.locator(f"#{name} input[type=number]").press("Enter")
    window.locator("#sample").click()
    window.wait_for_selector("#samples img")
    with urllib.request.urlopen(window.locator("#samples img").get_attribute("src")) as file:
        shown = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
    both = classes.samples(9, ["3", "8"], "all of these at once", moves=4, steps=20)
    assert np.array_equal(shown, classes.picture(both))
    window.locator("#samples").scroll_into_view_if_needed()
    keep(window, "compose")


@pytest.mark.slow
@needs_browser
def test_a_browser_edits_a_row(browse, wines):
    window = browse(wines, "zoo:table-example")
    before = window.locator("#words p").evaluate("e => e.outerHTML")
    cell = window.locator("#input [data-testid=cell-0-0]")
    cell.dblclick()
    window.keyboard.press("Control+A")
    window.keyboard.type("99")
    window.keyboard.press("Enter")
    window.locator("#edited").click()
    assert "more anomalous than 90.0 %" in changed(window, "#words p", before)
    keep(window, "table")
