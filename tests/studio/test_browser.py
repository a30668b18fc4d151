"""Somebody uses the studio in a real browser: opens a mask, paints, generates, compares, and takes the pair home."""

import io
import shutil
import threading
import time
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from studios import PATIENCE, TOKEN, RunningStudio, save_tiny_pipeline
from tiny import labels_of

from medvolume import MedVolumePipeline
from pipelines.planning import volume_seed
from studio.niivue import niivue_module

pytest.importorskip("starlette", reason="needs the extra studio")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra studio")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.skipif(find_spec("ipyniivue") is None, reason="needs ipyniivue"),
]
FLAGS = ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SMALL = {"width": 900, "height": 560}  # pixels take time in software
SHAPE = (12, 16, 8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def address(pipeline, tmp_path_factory):
    """The address of a studio of one model; each page has a session of its own."""
    with served([pipeline], tmp_path_factory.mktemp("studio")) as address:
        yield address


@contextmanager
def served(pipelines, folder):
    """Run a studio behind a real server, and yield its address."""
    studio = RunningStudio(pipelines, folder / "sessions", niivue_module())
    server = uvicorn.Server(uvicorn.Config(studio.app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/?token={TOKEN}"
    finally:
        server.should_exit = True
        thread.join()
        studio.worker.close()
    assert studio.failures == []


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(address, browser):
    """The page, once it is ready."""
    with opened_page(address, browser) as page:
        yield page


@contextmanager
def opened_page(address, browser):
    """Open the page, and yield it when it is ready. Its scripts may have no errors, and ask for nothing elsewhere."""
    context = browser.new_context(viewport=SMALL)
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda one: elsewhere.append(one.url) if not is_ours(one.url) else None)
    page.goto(address)
    until(lambda: page.evaluate("document.body.dataset.ready === 'true'"))
    yield page
    context.close()
    assert elsewhere == []
    assert [error for error in errors if "400 (Bad Request)" not in error] == []


def is_ours(url):
    return url.startswith(("http://127.0.0.1:", "blob:", "data:"))


def until(true):
    """Wait; `page.wait_for_function` would need eval, which the page's policy forbids."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def boxes(page):
    """Where everything is whose moving would be felt."""
    names = ["#generate", "#left-canvas", "#right-canvas", "#results", "#collection", "#labels", "#seed", "#blink"]
    return {name: page.locator(name).bounding_box() for name in names}


def generated(page, count):
    page.keyboard.press("g")
    until(lambda: page.evaluate("studio.state.results.size") == count and page.locator("#generate").is_enabled())


def opened(page, button, file, loaded):
    """Open a file by a button, and wait until `loaded`, which is JavaScript."""
    with page.expect_file_chooser() as chooser:
        page.locator(button).click()
    chooser.value.set_files(file)
    until(lambda: page.evaluate(loaded))


def drawn(page, shape):
    """The codes of the drawing (X, Y, Z)."""
    return np.array(page.evaluate("[...studio.left.nv.drawBitmap]"), np.uint8).reshape(shape, order="F")


def view(page, result):
    """The voxels of a generated volume, as the page shows them."""
    body = page.request.get(f"{page.url}api/results/{result}/view").body()
    return nib.Nifti1Image.from_bytes(body).get_fdata(dtype=np.float32)


def stroke(page, places):
    """Paint over places on the axial slice, in shares of its width and height."""
    x, y, width, height = axial_tile(page)
    strokes = page.evaluate("studio.undo.past.length")
    for number, (across, down) in enumerate(places):
        page.mouse.move(x + across * width, y + down * height)
        if number == 0:
            page.mouse.down()
    page.mouse.up()
    until(lambda: page.evaluate("studio.undo.past.length") == strokes + 1)


def axial_tile(page):
    """Where the axial slice is on the page, once it no longer moves: the viewer follows a new size of the window."""
    places = [tile_now(page)]

    def at_rest():
        time.sleep(0.4)
        places.append(tile_now(page))
        canvas = "studio.left.nv.canvas"
        fits = page.evaluate(f"Math.abs({canvas}.width - {canvas}.clientWidth * studio.left.nv.uiData.dpr) < 2")
        return fits and places[-1] == places[-2]

    until(at_rest)
    return places[-1]


def tile_now(page):
    """The axial slice of the left view: its box on the page."""
    left, top, width, height = page.evaluate(
        "(() => { const nv = studio.left.nv, one = nv.screenSlices.find((one) => one.axCorSag === 0);"
        " return [...one.leftTopWidthHeight].map((value) => value / nv.uiData.dpr); })()"
    )
    canvas = page.locator("#left-canvas").bounding_box()
    return canvas["x"] + left, canvas["y"] + top, width, height


def test_paint_generate_compare_and_download(page, pipeline, tmp_path):
    # a mask of background in LAS order with voxels of three sizes, away from the origin
    affine = np.diag([-1.0, 1.5, 2.0, 1.0])
    affine[:3, 3] = 30, -12, 5
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), affine), tmp_path / "case.nii.gz")
    loaded = "studio.state.mask?.name === 'case' && studio.undo.now?.length === 1536"
    opened(page, "#open-mask", tmp_path / "case.nii.gz", loaded)
    page.set_viewport_size({"width": 1280, "height": 720})
    before = boxes(page)
    assert page.locator("#model").is_visible() and not page.locator("#models").is_visible()  # there is one

    page.keyboard.press("2")
    start, end = (0.2, 0.3), (0.4, 0.3)  # of the tile's width and height: in the patient's right half, in front
    stroke(page, [(share, 0.3) for share in (start[0], 0.25, 0.3, 0.35, end[0])])

    page.keyboard.press("Control+z")
    assert page.evaluate("studio.left.nv.drawBitmap.every((code) => code === 0)")
    page.keyboard.press("Control+Shift+z")
    assert page.evaluate("studio.left.nv.drawBitmap.some((code) => code === 2)")

    generated(page, 1)
    page.locator("#seed").fill("5")
    page.locator("#right-canvas").focus()
    generated(page, 2)
    assert boxes(page) == before

    # compare: the second on the right, the first on the left; the crosshair is one; blink
    page.locator("#left").select_option(label="#1 case_v2")
    until(lambda: page.evaluate("studio.left.shows").startswith("result:") and page.locator("#blink").is_enabled())
    canvas = page.locator("#right-canvas").bounding_box()
    page.mouse.click(canvas["x"] + canvas["width"] * 0.3, canvas["y"] + canvas["height"] * 0.3)
    places = page.evaluate("[studio.left, studio.right].map((pane) => [...pane.nv.scene.crosshairPos])")
    assert np.allclose(*places, atol=1e-5) and not np.allclose(places[0], 0.5)
    page.keyboard.press("k")
    until(lambda: page.evaluate("studio.right.nv.volumes.length === 2 && studio.right.nv.volumes[1].opacity === 1"))
    page.keyboard.press("k")
    until(lambda: page.evaluate("studio.right.nv.volumes.length === 1"))
    assert boxes(page) == before

    with page.expect_download() as download:
        page.locator(".card[data-id] >> nth=0 >> a").click()
    pair = tmp_path / "pair"
    with zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes())) as packed:
        packed.extractall(pair)
    mask = nib.load(pair / "case_v2.nii.gz")
    assert np.array_equal(mask.affine, affine) and mask.shape == SHAPE
    check_stroke(mask, start, end)
    pipe = MedVolumePipeline.from_pretrained(pipeline)
    seed = volume_seed(5, "case_v2", 0)
    theirs = pipe(mask=str(pair / "case_v2.nii.gz"), generator=[torch.Generator().manual_seed(seed)]).volumes[0]
    ours = nib.load(pair / "case_v2_000.nii.gz")
    assert int((ours.get_fdata() != theirs.get_fdata()).sum()) == 0 and ours.get_fdata().std() > 0
    assert np.array_equal(ours.affine, affine)


def check_stroke(mask, start, end):
    """The painted voxels lie where the stroke was, by radiology's convention: the patient's right is on the left of the
    screen, the front above."""
    values = nib.as_closest_canonical(mask).get_fdata()
    painted = np.argwhere(values == 5)  # the label of code 2
    assert len(painted) >= 3 and set(np.unique(values)) == {0, 5}
    x, y, _ = SHAPE
    assert (
        abs(painted[:, 0].max() + 0.5 - (1 - start[0]) * x) < 2
        and abs(painted[:, 0].min() + 0.5 - (1 - end[0]) * x) < 2
    )
    assert abs(painted[:, 1].mean() + 0.5 - (1 - start[1]) * y) < 1.5
    assert len(np.unique(painted[:, 2])) == 1


def test_wrong_files_are_refused_on_the_page(page, tmp_path):
    shown = page.locator("#mask").input_value()
    nib.save(nib.Nifti1Image(np.full(SHAPE, 7, np.int16), np.eye(4)), tmp_path / "seven.nii.gz")
    (tmp_path / "notes.nii.gz").write_text("not a volume")
    said = "document.querySelector('#message.bad')?.textContent"
    for name, message in (("seven.nii.gz", "holds"), ("notes.nii.gz", "notes.nii.gz: ")):
        page.evaluate("document.getElementById('message').textContent = ''")
        opened(page, "#open-mask", tmp_path / name, f"Boolean({said})")
        assert (
            message in page.locator("#message").inner_text()
            and str(tmp_path) not in page.locator("#message").inner_text()
        )
    assert page.locator("#mask").input_value() == shown
    assert labels_of((8, 10, 12)).size == page.evaluate("studio.undo.now.length")


def test_gaps_between_slices_are_filled(page):
    """The chosen label grows from slice to slice, and covers background alone."""
    x, y, z = 8, 10, 12  # the example mask
    drawing = np.zeros((x, y, z), np.uint8)
    drawing[2:4, 3:6, 2] = drawing[2:6, 3:8, 6] = 1
    drawing[2, :, 4] = 2
    page.keyboard.press("1")
    page.evaluate(
        "(codes) => { studio.left.nv.drawBitmap.set(codes); studio.undo.now.set(codes); }",
        drawing.ravel(order="F").tolist(),
    )
    page.keyboard.press("i")
    until(lambda: page.evaluate("studio.undo.past.length") == 1)
    filled = drawn(page, drawing.shape)
    changed = filled != drawing
    assert (filled[changed] == 1).all() and (drawing[changed] == 0).all()
    assert not changed[:, :, [0, 1, 2, 6, 7, 8]].any()
    counts = [int((filled[3:, :, k] == 1).sum()) for k in range(2, 7)]
    assert counts == sorted(counts) and counts[0] < counts[2] < counts[4]
    for k in (3, 4, 5):  # within the larger slice, around the smaller one
        ones = filled[:, :, k] == 1
        assert ones[3, 3:6].all() and not (ones & (drawing[:, :, 6] != 1)).any()


def test_grow_takes_what_is_joined_and_looks_alike(page, tmp_path):
    """A click labels voxels that are joined to it by faces, of its brightness within the tolerance, and unlabeled."""
    brightness = np.random.default_rng(0).uniform(75, 125, SHAPE).astype(np.float32)  # of 0 to 1000
    brightness[0] = np.linspace(0, 1000, SHAPE[1])[:, None]
    brightness[2:8, 3:9, 1:6] += 400  # a block, one that touches it at an edge only, and a plate beside it
    brightness[8:10, 9:12, 1:6] += 400
    brightness[2:8, 11:13] += 400
    nib.save(nib.Nifti1Image(brightness, np.diag([1.0, 1.5, 2.0, 1.0])), tmp_path / "scan.nii.gz")
    opened(page, "#open-image", tmp_path / "scan.nii.gz", "studio.left.shows.startsWith('paint:')")
    page.evaluate("Object.assign(studio.left.nv.volumes[0], { cal_min: 0, cal_max: 1000 })")
    page.keyboard.press("2")
    page.evaluate(  # label 2 lies on one column of the block
        "([x, y]) => { for (let k = 0; k < 8; k++) studio.left.nv.drawBitmap[5 + x * (5 + y * k)] = 2; }", SHAPE[:2]
    )
    page.locator("#left-canvas").dispatch_event("pointerup")
    until(lambda: page.evaluate("studio.undo.past.length") == 1)
    before = drawn(page, SHAPE)

    page.keyboard.press("1")
    page.keyboard.press("w")
    assert page.locator("#tolerance").is_visible() and not page.locator("#size").is_visible()
    click_axial(page, 3, 4)
    until(lambda: page.evaluate("studio.undo.past.length") == 2)
    block = np.zeros(SHAPE, bool)
    block[2:8, 3:9, 1:6] = True
    expected = np.where(block & (before == 0), 1, before)
    assert np.array_equal(drawn(page, SHAPE), expected)

    page.keyboard.press("Control+z")
    assert np.array_equal(drawn(page, SHAPE), before)
    page.keyboard.press("Control+Shift+z")
    assert np.array_equal(drawn(page, SHAPE), expected)

    for _ in range(9):
        page.keyboard.press("[")
    assert page.locator("#tolerance-shown").inner_text() == "1 %"
    click_axial(page, 5, 14)  # within 10 of its own brightness, among noise of 75 to 125
    until(lambda: page.evaluate("studio.undo.past.length") == 3)
    after, k = drawn(page, SHAPE), page.evaluate("studio.left.nv.frac2vox(studio.left.nv.scene.crosshairPos)[2]")
    alike = (np.abs(brightness - brightness[5, 14, k]) <= 10) & (expected == 0)
    parts = ndimage.label(alike)[0]
    assert np.array_equal(after != expected, parts == parts[5, 14, k])
    assert 1 < (after != expected).sum() < alike.sum() < (expected == 0).sum()

    click_axial(page, 3, 4)  # has the label already
    until(lambda: "click beside it" in page.locator("#message").inner_text())
    assert np.array_equal(drawn(page, SHAPE), after)


def click_axial(page, i, j):
    """Click the middle of voxel (i, j) of the axial slice: i rises to the left of the screen, j upward."""
    x, y, width, height = axial_tile(page)
    columns, rows, _ = page.evaluate("studio.left.grid.shape")
    page.mouse.click(x + (1 - (i + 0.5) / columns) * width, y + (1 - (j + 0.5) / rows) * height)


def test_a_dropped_mask_is_edited_and_compared(page, tmp_path):
    """A mask is dropped on the page; of its volume a part is generated again, and the difference shows which."""
    shape = (40, 12, 8)
    values = np.zeros(shape, np.int16)
    values[4:36, 3:9, 2:6] = 2
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "long.nii.gz")
    drop(page, tmp_path / "long.nii.gz")
    until(lambda: page.evaluate("studio.state.mask?.name === 'long' && studio.undo.now?.length === 3840"))
    assert page.locator("#drop").is_hidden()
    assert np.array_equal(drawn(page, shape), values == 2)  # label 2 has code 1

    generated(page, 1)
    page.locator("#edit").select_option(label="Keep #1 but for my changes")
    page.locator("#left-canvas").focus()
    page.keyboard.press("2")
    stroke(page, [(0.1, 0.5), (0.15, 0.5)])
    painted = drawn(page, shape) != (values == 2)
    generated(page, 2)
    assert page.evaluate("[...studio.state.results.values()].map((one) => one.edited)") == [False, True]
    first, second = (view(page, id) for id in page.evaluate("[...studio.state.results.keys()]"))
    far = ndimage.distance_transform_edt(~painted) > 7  # mm; the surroundings are 6
    assert far.any() and np.array_equal(first[far], second[far])
    assert (first[painted] != second[painted]).all()

    page.locator("#left").select_option(label="#1 long")
    until(lambda: page.locator("#difference").is_enabled())
    page.keyboard.press("d")
    until(lambda: page.locator("#difference").get_attribute("aria-pressed") == "true")
    low, high, shown = page.evaluate(
        "(({ cal_min, cal_max, img }) => [cal_min, cal_max, [...img]])(studio.right.nv.volumes[0])"
    )
    assert np.array_equal(np.array(shown, np.float32).reshape(shape, order="F"), second - first)
    assert high == -low == pytest.approx(np.abs(second - first).max(), rel=1e-6)
    page.keyboard.press("d")
    until(lambda: page.evaluate("studio.right.shows.startsWith('result:')"))
    assert np.array_equal(np.array(page.evaluate("[...studio.right.nv.volumes[0].img]")), second.ravel(order="F"))


def test_views_are_clicked_while_one_loads(page):
    """A view that waits for its volume takes no clicks, and the other moves alone. The fixture fails for errors."""
    generated(page, 1)
    page.locator("#seed").fill("5")
    page.locator("#right-canvas").focus()
    generated(page, 2)
    page.locator("#left").select_option(index=page.locator("#left option").count() - 2)
    until(lambda: page.evaluate("studio.left.shows.startsWith('result:')"))
    held = []
    page.route("**/api/results/*/view*", lambda route: held.append(route), times=1)
    first, second = page.evaluate("[...studio.state.results.keys()]")
    before = page.evaluate("studio.right.shows")
    page.locator("#right").select_option(first if before == f"result:{second}" else second)
    until(lambda: page.evaluate("studio.right.nv.volumes.length") == 0)
    for canvas in (page.locator("#left-canvas").bounding_box(), page.locator("#right-canvas").bounding_box()):
        page.mouse.click(canvas["x"] + canvas["width"] * 0.3, canvas["y"] + canvas["height"] * 0.3)
    alone = page.evaluate("[...studio.left.nv.scene.crosshairPos]")
    assert not np.allclose(alone, 0.5)
    for one in held:
        one.continue_()
    until(lambda: page.evaluate("studio.right.shows") not in ("", before))
    canvas = page.locator("#left-canvas").bounding_box()
    page.mouse.click(canvas["x"] + canvas["width"] * 0.35, canvas["y"] + canvas["height"] * 0.35)
    places = page.evaluate("[studio.left, studio.right].map((pane) => [...pane.nv.scene.crosshairPos])")
    assert np.allclose(*places, atol=1e-5) and not np.allclose(places[0], alone)


def test_a_stroke_that_is_painted_late_is_a_step_of_undo(page):
    """NiiVue may paint after the end of the stroke was noticed. What comes next is another step."""
    before = drawn(page, (8, 10, 12))
    page.evaluate(  # the page looks first 60 ms after the stroke
        "() => { const canvas = document.getElementById('left-canvas');"
        " canvas.dispatchEvent(new PointerEvent('pointerup', { bubbles: true }));"
        " const late = () => { window.steps = studio.undo.past.length; studio.left.nv.drawBitmap.fill(1, 0, 8); };"
        " setTimeout(late, 150); }"
    )
    until(lambda: page.evaluate("studio.undo.past.length") == 1)
    assert page.evaluate("window.steps") == 0
    first = drawn(page, before.shape)
    assert (first != before).any()

    page.evaluate("studio.left.nv.drawBitmap.fill(2, 8, 16)")
    page.locator("#left-canvas").dispatch_event("pointerup")
    until(lambda: page.evaluate("studio.undo.past.length") == 2)
    for expected in (first, before):
        page.keyboard.press("Control+z")
        assert np.array_equal(drawn(page, before.shape), expected)


def test_another_model_is_chosen(browser, tmp_path):
    """Two models generate from one mask; the page does not move, and a model that does not fit is refused."""
    folders = [save_tiny_pipeline(tmp_path / "teacher"), save_tiny_pipeline(tmp_path / "student", steps=2, seed=1)]
    folders.append(save_tiny_pipeline(tmp_path / "other", channels=["CT"]))
    with served(folders, tmp_path) as address, opened_page(address, browser) as page:
        before = boxes(page)
        chosen = page.locator("#model-list")
        assert chosen.locator("option").all_inner_texts() == ["teacher", "student", "other"]
        assert not page.locator("#model").is_visible()
        page.locator("#steps").fill("4")
        page.locator("#left-canvas").focus()
        generated(page, 1)

        page.keyboard.press("n")
        until(lambda: page.evaluate("studio.state.model.name") == str(folders[1]))
        assert (chosen.input_value(), page.locator("#steps").input_value()) == (str(folders[1]), "2")
        generated(page, 2)
        results = page.evaluate(
            "[...studio.state.results.values()].map(({ model, steps, mask }) => [model, steps, mask])"
        )
        assert [result[:2] for result in results] == [[str(folders[0]), 4], [str(folders[1]), 2]]
        assert results[0][2] == results[1][2]
        assert page.locator(".card .of").all_inner_texts() == ["student", "teacher"]
        assert page.locator("#right option").all_inner_texts() == ["#1 teacher · first", "#2 student · first"]

        chosen.select_option("other")
        said = "document.querySelector('#message.bad')?.textContent ?? ''"
        until(lambda: "channels (CT; there MR); start a second studio" in page.evaluate(said))
        assert (chosen.input_value(), page.evaluate("studio.state.model.name")) == (str(folders[1]),) * 2
        page.locator("#left-canvas").focus()
        page.keyboard.press("n")  # past the one that was refused
        until(lambda: page.evaluate("studio.state.model.name") == str(folders[0]))
        assert page.locator("#steps").input_value() == "4"  # as it was left
        assert boxes(page) == before


def drop(page, file):
    """Drag a file over the page, and drop it."""
    page.evaluate(
        "([bytes, name]) => { const data = new DataTransfer();"
        " data.items.add(new File([Uint8Array.from(bytes)], name));"
        " const send = (kind) => document.body.dispatchEvent("
        "   new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));"
        " send('dragenter'); window.overlay = !document.getElementById('drop').hidden; send('drop'); }",
        [list(file.read_bytes()), file.name],
    )
    assert page.evaluate("window.overlay")
