"""One reader goes through a study in a real browser, from file://, by keyboard, with a closed tab in between."""

import itertools
import json
import shutil

import numpy as np
import pytest
from study_folders import study, write_sets

from reader_study.answers import read_answers
from reader_study.design import REAL, Plan

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu"]


@pytest.fixture
def browser(tmp_path):
    """A browser with a profile that outlives its pages; every request is noted."""
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1280, "height": 720},
            accept_downloads=True,
        )
        yield context
        context.close()


def opened(browser, folder, requests, errors):
    page = browser.new_page()
    page.set_default_timeout(180_000)  # a busy machine draws slowly
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((folder / "index.html").as_uri())
    return page


def wait(page, condition):
    """Wait until JavaScript says so; the page forbids the `eval` of Playwright's own waiting."""
    for _ in range(1800):
        if page.evaluate(f"Boolean({condition})"):
            return
        page.wait_for_timeout(100)
    raise AssertionError(condition)


def shown(page):
    wait(page, "state.position >= CONTENT.items.length || (viewers[0] && viewers[0].voxels)")
    return page.evaluate("state.position")


def press(page, keys):
    for key in keys:
        page.keyboard.press(key)


def test_a_reader_resumes_and_exports(tmp_path, browser):
    write_sets(tmp_path, 6)
    folder, key = study(tmp_path, Plan(1, 0, 2, 0.2, 2))
    items = key.readers["reader_1"]
    requests, errors = [], []
    page = opened(browser, folder / "reader_1", requests, errors)
    page.keyboard.press("Enter")
    sizes = set()
    for place, item in enumerate(items[:5]):
        assert shown(page) == place
        sizes.add(json.dumps(page.locator("#next").bounding_box()))
        truth = "R" if key.cases[item.cases[0]].source == REAL else "G"
        press(page, ["Enter", truth, "4", "C", "D", "B"])
        sizes.add(json.dumps(page.locator("#next").bounding_box()))
        if item.section == "training":
            page.keyboard.press("Enter")
            assert page.locator("#truth").inner_text().startswith("Right: this volume is")
        page.keyboard.press("Enter")
    assert len(sizes) == 1  # nothing jumps
    assert shown(page) == 5
    press(page, ["G", "ArrowUp", "ArrowUp", "ArrowRight", "PageDown", "]", "+", "m", "m", "0"])
    press(page, ["n", *"Odd", "Escape"])
    page.close()
    page = opened(browser, folder / "reader_1", requests, errors)  # resumes where it was, with the open answer
    assert shown(page) == 5 and page.locator("#comment").input_value() == "Odd"
    press(page, ["5", "A", "A", "A", "Enter"])
    for item in items[6:]:
        shown(page)
        press(page, ["L", "1", "Enter"] if item.section == "pair" else ["R", "1", "D", "D", "D", "Enter"])
    page.wait_for_selector("#end:not([hidden])")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    file = tmp_path / "answers.json"
    download.value.save_as(file)
    assert not errors and all(url.startswith(("file:", "blob:", "data:")) for url in requests), (errors, requests)
    readings = read_answers([file], key)
    assert [reading.item.id for reading in readings] == [item.id for item in items]
    assert readings[0].answers | {"decision": ""} == {
        "decision": "",
        "confidence": "4",
        "appearance": "C",
        "consistency": "D",
        "anatomy": "B",
    }
    assert readings[0].correct and readings[5].comment == "Odd" and readings[5].answers["decision"] == "G"
    assert readings[5].visits == 2 and readings[5].seconds > 0
    log = json.loads(file.read_text())["answers"][items[5].id]["log"]
    assert {"slice", "plane", "window", "zoom", "large", "reset", "answer"} <= {entry[1] for entry in log}
    assert all(later[0] >= earlier[0] for earlier, later in itertools.pairwise(log))


def test_slices_are_shown_as_radiologists_see_them(tmp_path, browser):
    """In the axial plane the patient's right is on the left, and the front is on top."""
    write_sets(tmp_path, 6)
    folder, _ = study(tmp_path, Plan(1, 0, 0, 0, 0))
    errors: list[str] = []
    page = opened(browser, folder / "reader_1", [], errors)
    page.keyboard.press("Enter")
    shown(page)
    read = """() => {
        const viewer = viewers[0], [X, Y, Z] = viewer.shape, view = viewer.views[0];
        viewer.voxels = Uint8Array.from({length: X * Y * Z}, (_, i) => (i % X) * 20);  // brighter to the right
        viewer.draw();
        const row = view.source.getContext("2d").getImageData(0, 0, X, 1).data;
        viewer.voxels = Uint8Array.from({length: X * Y * Z}, (_, i) => Math.floor(i / X) % Y * 20); // to the front
        viewer.draw();
        const column = view.source.getContext("2d").getImageData(0, 0, 1, Y).data;
        return [[...row].filter((_, i) => i % 4 === 0), [...column].filter((_, i) => i % 4 === 0)];
    }"""
    row, column = page.evaluate(read)
    assert row == [20 * i for i in range(11, -1, -1)] and column == [20 * i for i in range(9, -1, -1)]
    assert not errors


def test_the_page_fits_screens_and_refuses_other_files(tmp_path, browser):
    write_sets(tmp_path, 6)
    folder, _ = study(tmp_path, Plan(1, 0, 0, 0, 2))
    page = opened(browser, folder / "reader_1", [], [])
    (tmp_path / "other.json").write_text('{"format": "another"}')
    page.set_input_files("#file", str(tmp_path / "other.json"))
    wait(page, "document.getElementById('said').textContent.startsWith('This file holds no answers')")
    page.locator("#begin").click()
    shown(page)
    for width, height in ((1280, 720), (1024, 768), (820, 1180)):
        page.set_viewport_size({"width": width, "height": height})
        box = page.locator("#next").bounding_box()
        assert box and box["y"] + box["height"] <= height and box["x"] + box["width"] <= width, (width, height)
        plane = page.locator(".plane").first.bounding_box()
        assert plane and min(plane["width"], plane["height"]) > 150, (width, height)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert np.isclose(page.evaluate("CONTENT.items.length"), 14)
