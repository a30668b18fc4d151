"""The studio's server without a browser: who may use it, masks on their own grids, the queue, the downloads."""

import gzip
import io
import itertools
import json
import shlex
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, ornt_transform
from studios import (
    PATIENCE,
    TOKEN,
    RunningStudio,
    finished,
    generated,
    loaded,
    mask_of,
    save_tiny_pipeline,
    unpacked,
    upload,
)
from tiny import labels_of, mask_image, tiny_pipeline

import edit as edit_command
import generate as generate_command
from diffusion import LatentUNet3D
from medvolume import MedVolumePipeline
from volumes import Volume, write_dicom

testclient = pytest.importorskip("starlette.testclient", reason="needs the extra studio")
ROOT = Path(__file__).resolve().parents[2]
CODES = {0: 0, 2: 1, 5: 2}  # of the tiny pipeline's labels


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def studio(pipeline, tmp_path):
    studio = RunningStudio([pipeline], tmp_path / "sessions")
    yield studio
    studio.worker.close()
    assert studio.failures == []


@pytest.fixture
def browser(studio):
    return studio.browser()


# Who may use it


def test_nothing_is_served_without_the_token(studio):
    client = testclient.TestClient(studio.app, base_url="http://127.0.0.1:7860")
    paths = ["/", "/studio.js", "/regions.js", "/niivue.js", "/api/state", "/?token=", "/?token=wrong"]
    paths.append("/api/state?token=" + TOKEN)
    assert {path: client.get(path).status_code for path in paths} == dict.fromkeys(paths, 403)
    assert client.post("/api/uploads").status_code == 403
    client.cookies.set("medvolume_studio", "made-up")
    assert client.get("/api/state").status_code == 403
    assert studio.sessions.open == {}


def test_the_token_leaves_the_address(studio):
    client = testclient.TestClient(studio.app, base_url="http://127.0.0.1:7860", follow_redirects=False)
    answer = client.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert {"httponly", "samesite=lax"} <= set(answer.headers["set-cookie"].lower().split("; "))
    page = client.get("/")
    assert page.status_code == 200 and "frame-ancestors 'none'" in page.headers["content-security-policy"]


def test_other_hosts_and_other_pages_are_refused(studio, browser):
    assert browser.get("/api/state", headers={"host": "evil.example"}).status_code == 400
    assert browser.get("/api/state", headers={"host": "localhost:7860"}).status_code == 200
    for site in ("cross-site", "same-site"):
        assert browser.post("/api/uploads", headers={"sec-fetch-site": site}).status_code == 403
        assert browser.get("/api/state", headers={"sec-fetch-site": site}).status_code == 403
        assert browser.get("/", headers={"sec-fetch-site": site}).status_code == 200  # a link to the page


def test_hosts_by_the_address_that_is_listened_at():
    from studio.guard import allowed_hosts, is_loopback

    assert allowed_hosts("127.0.0.1") == [*allowed_hosts("::1")[1:], "[::1]"] == ["127.0.0.1", "localhost", "[::1]"]
    assert allowed_hosts("10.0.0.5")[0] == "10.0.0.5" and allowed_hosts("0.0.0.0") == ["*"]
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "0.0.0.0", "10.0.0.5")] == [
        True,
        True,
        False,
        False,
    ]


# Masks


@pytest.mark.parametrize("codes", ["".join(c) for c in itertools.product("LR", "AP", "SI")])
@pytest.mark.parametrize("kind", ["plain", "oblique", "permuted"])
def test_masks_come_back_on_their_own_grid(browser, codes, kind):
    """8 orientations, anisotropic, oblique and with permuted axes: what is painted lies where it was painted."""
    shape = (5, 7, 6)
    ras = np.diag([0.8, 1.5, 3.0, 1.0])
    ras[:3, 3] = -20.0, 33.5, 7.25
    if kind == "oblique":
        a, b = np.deg2rad(17), np.deg2rad(-9)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        ras[:3, :3] = turn @ tilt @ ras[:3, :3]
    wanted = "".join(codes[n] for n in (2, 0, 1)) if kind == "permuted" else codes
    canonical = nib.Nifti1Image(labels_of(shape, seed=3), ras)
    turned = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(wanted))
    stored = nib.Nifti1Image.from_bytes(canonical.as_reoriented(turned).to_bytes())  # as the file has it
    assert nib.aff2axcodes(stored.affine) == tuple(wanted)

    mask = mask_of(browser, stored)
    assert mask["shape"] == list(shape)
    assert np.allclose(mask["affine"], ras, atol=1e-5)
    drawing = np.frombuffer(browser.get(f"/api/masks/{mask['id']}/drawing").content, np.uint8)
    drawing = drawing.reshape(shape, order="F").copy()
    assert np.array_equal(drawing, np.vectorize(CODES.get)(canonical.get_fdata().astype(int)))

    spot = 4, 1, 2  # in RAS+: far right, posterior, low
    drawing[spot] = 2 if drawing[spot] != 2 else 1
    painted = browser.post(f"/api/masks/{mask['id']}/paint", content=drawing.tobytes(order="F")).json()["mask"]
    assert painted["name"] == "case_v2"
    saved = nib.Nifti1Image.from_bytes(gzip.decompress(browser.get(f"/api/masks/{painted['id']}/file").content))
    assert np.array_equal(saved.affine, stored.affine) and saved.shape == stored.shape
    changed = np.argwhere(saved.get_fdata() != stored.get_fdata())
    assert len(changed) == 1
    here = np.linalg.solve(ras, saved.affine @ [*changed[0], 1])[:3]
    assert np.allclose(here, spot, atol=1e-4)
    assert saved.get_fdata()[tuple(changed[0])] == {1: 2, 2: 5}[drawing[spot]]


def test_an_unchanged_mask_stays_the_users_file(browser):
    mask = mask_of(browser, mask_image((6, 5, 4)))
    drawing = browser.get(f"/api/masks/{mask['id']}/drawing").content
    assert browser.post(f"/api/masks/{mask['id']}/paint", content=drawing).json()["mask"]["id"] == mask["id"]


def test_an_example_is_not_renamed(browser, pipeline):
    """A file of the user has its name: examples lie in the pipeline's folder, which is not the session's to change."""
    mask_of(browser, mask_image((6, 5, 4)), "First.nii.gz")
    answer = browser.post("/api/masks", json={"example": 0})
    assert answer.status_code == 400 and "the session has a mask of this name" in answer.json()["error"]
    assert [path.name for path in (pipeline / "masks").iterdir()] == ["first.nii.gz"]


def test_outside_the_field_of_view_stays_outside(browser):
    labels = labels_of((6, 5, 4))
    labels[0] = -1
    mask = mask_of(browser, nib.Nifti1Image(labels, np.eye(4)))
    drawing = bytearray(browser.get(f"/api/masks/{mask['id']}/drawing").content)
    assert drawing[0] == 255
    drawing[1] = 1
    painted = browser.post(f"/api/masks/{mask['id']}/paint", content=bytes(drawing)).json()["mask"]
    saved = nib.Nifti1Image.from_bytes(gzip.decompress(browser.get(f"/api/masks/{painted['id']}/file").content))
    assert (saved.get_fdata()[0] == -1).all() and saved.get_fdata()[1, 0, 0] == 2


def test_nrrd_and_dicom_are_read(browser, tmp_path):
    image = sitk.GetImageFromArray(labels_of((6, 5, 4)).transpose(2, 1, 0).astype(np.int16))
    sitk.WriteImage(image, str(tmp_path / "case.nrrd"))
    number = upload(browser, **{"case.nrrd": (tmp_path / "case.nrrd").read_bytes()})
    answer = browser.post("/api/masks", json={"upload": number})
    assert answer.json()["mask"]["shape"] == [6, 5, 4]

    volume = Volume(labels_of((6, 5, 4))[None].astype(np.float32), np.diag([1.0, 1, 2, 1]))
    write_dicom(volume, tmp_path / "series", modality="MR", software="test", model="none")
    slices = sorted((tmp_path / "series").iterdir())
    loose = upload(browser, **{path.name: path.read_bytes() for path in slices})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in slices:
            archive.write(path, f"scan/{path.name}")
    zipped = upload(browser, **{"scan.zip": packed.getvalue()})
    for number, name in ((loose, "series"), (zipped, "scan")):
        answer = browser.post("/api/images", json={"upload": number})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["image"]["shape"], answer.json()["image"]["name"]) == ([6, 5, 4], name)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("notes.txt", b"hello", "notes.txt: is not of a supported kind"),
        ("case.nii.gz", b"hello", "case.nii.gz: "),
        ("case.zip", b"hello", "case.zip: is not a zip archive"),
        ("../../case.txt", b"hello", "case.txt: is not of a supported kind"),
        (
            "other.nii.gz",
            nib.Nifti1Image(np.full((4, 4, 4), 9, np.int16), np.eye(4)),
            "This model was trained on 0 = back",
        ),
        ("image.nii.gz", nib.Nifti1Image(np.full((4, 4, 4), 0.5, np.float32), np.eye(4)), "is it an image or a prob"),
    ],
)
def test_wrong_files_are_refused_by_our_readers(browser, studio, name, data, message):
    data = data if isinstance(data, bytes) else gzip.compress(data.to_bytes())
    answer = browser.post("/api/masks", json={"upload": upload(browser, **{name: data})})
    assert answer.status_code == 400 and message in answer.json()["error"]
    assert str(studio.sessions.folder) not in answer.json()["error"]


@pytest.mark.parametrize("name", ["", ".hidden.nii.gz", "..", "a/..", "x\x00y.nii", "n" * 300 + ".nii.gz"])
def test_names_that_are_none_are_refused(browser, studio, name):
    number = browser.post("/api/uploads").json()["upload"]
    answer = browser.put(f"/api/uploads/{number}", params={"name": name}, content=b"x")
    assert answer.status_code == 400 and answer.json()["error"]
    assert [path for path in studio.sessions.folder.rglob("*") if path.is_file()] == []


def test_uploads_are_limited(pipeline, tmp_path):
    studio = RunningStudio([pipeline], tmp_path / "sessions", most=1000)
    client = studio.browser()
    number = client.post("/api/uploads").json()["upload"]
    assert client.put(f"/api/uploads/{number}", params={"name": "a.nii"}, content=bytes(600)).status_code == 200
    assert client.put(f"/api/uploads/{number}", params={"name": "b.nii"}, content=bytes(600)).status_code == 413
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.nii", bytes(1 << 20))
    client = studio.browser()
    number = client.post("/api/uploads").json()["upload"]
    archive = packed.getvalue()
    studio.sessions.find(client.cookies["medvolume_studio"]).used = -len(archive)  # room for it, not its content
    assert client.put(f"/api/uploads/{number}", params={"name": "b.zip"}, content=archive).status_code == 200
    answer = client.post("/api/masks", json={"upload": number})
    assert answer.status_code == 413 and "holds more than" in answer.json()["error"]
    left = [path.name for path in studio.sessions.folder.rglob("*") if path.is_file()]
    assert sorted(left) == ["a.nii", "b.zip"]
    studio.worker.close()


def test_drawings_of_another_grid_are_refused(browser):
    mask = mask_of(browser, mask_image((6, 5, 4)))
    for content, message in ((bytes(7), "has 7 voxels"), (b"\x09" * 120, "no labels of this model")):
        answer = browser.post(f"/api/masks/{mask['id']}/paint", content=content)
        assert answer.status_code == 400 and message in answer.json()["error"]


# Generation


def test_the_download_is_what_python_and_the_command_make(browser, pipeline, tmp_path, monkeypatch):
    mask = browser.post("/api/masks", json={"example": 0}).json()["mask"]
    drawing = bytearray(browser.get(f"/api/masks/{mask['id']}/drawing").content)
    drawing[100:140] = bytes([2]) * 40
    mask = browser.post(f"/api/masks/{mask['id']}/paint", content=bytes(drawing)).json()["mask"]
    result = generated(browser, mask=mask["id"], seed=7, steps=2)
    folder = unpacked(browser, f"/api/results/{result['id']}/download", tmp_path / "pair")
    names = ["again.py", "again.sh", "first_v2.nii.gz", "first_v2_000.json", "first_v2_000.nii.gz"]
    assert sorted(path.name for path in folder.iterdir()) == names
    ours = nib.load(folder / "first_v2_000.nii.gz")
    monkeypatch.chdir(folder)

    exec((folder / "again.py").read_text(), {})
    words = shlex.split((folder / "again.sh").read_text())
    assert words[:2] == ["medvolume", "generate"]
    generate_command.main(words[2:])
    for other in (folder / "first_v2_000_again.nii.gz", folder / "again" / "first_v2_000.nii.gz"):
        theirs = nib.load(other)
        assert np.array_equal(ours.get_fdata(), theirs.get_fdata()) and ours.get_fdata().std() > 0
        assert np.array_equal(ours.affine, theirs.affine)
    sidecars = [
        json.loads(path.read_text()) for path in (folder / "first_v2_000.json", folder / "again/first_v2_000.json")
    ]
    assert sidecars[0] == sidecars[1]


def test_the_pipelines_own_settings_are_left_to_it(browser):
    mask = mask_of(browser, mask_image((6, 5, 4)))
    result = generated(browser, mask=mask["id"], seed=1, steps=3, guidance=1)
    assert result["steps"] == 3
    text = browser.get(f"/api/results/{result['id']}/again").json()
    assert "--steps" not in text["command"] and "num_inference_steps" not in text["python"]


def test_two_sessions_know_nothing_of_each_other(studio):
    one, other = studio.browser(), studio.browser()
    masks = [mask_of(client, mask_image((6, 5, 4), seed=seed)) for seed, client in enumerate((one, other))]
    jobs = [
        client.post("/api/jobs", json={"mask": mask["id"]}).json()
        for client, mask in zip((one, other), masks, strict=True)
    ]
    assert other.get(f"/api/jobs/{jobs[0]['id']}").status_code == 404
    results = [finished(client, job)["result"] for client, job in zip((one, other), jobs, strict=True)]
    assert len(one.get("/api/state").json()["results"]) == 1
    volumes = [
        client.get(f"/api/results/{result['id']}/view").content
        for client, result in zip((one, other), results, strict=True)
    ]
    assert volumes[0] != volumes[1]
    folders = set(studio.sessions.folder.iterdir())
    assert len(folders) == 2
    one.delete("/api/session")
    assert one.get("/api/state").status_code == 403
    assert len(set(studio.sessions.folder.iterdir())) == 1
    assert other.get("/api/state").status_code == 200


def test_requests_queue_and_can_be_canceled(studio, pipeline, monkeypatch):
    client = studio.browser()
    mask = mask_of(client, mask_image((8, 8, 8)))
    at_step, go_on = threading.Event(), threading.Event()
    pipe = loaded(str(pipeline))
    original = pipe.unet.forward

    def slow(*args, **options):
        at_step.set()
        assert go_on.wait(PATIENCE)
        return original(*args, **options)

    monkeypatch.setattr(pipe.unet, "forward", slow)
    jobs = [client.post("/api/jobs", json={"mask": mask["id"], "seed": seed, "steps": 5}).json() for seed in range(3)]
    assert at_step.wait(PATIENCE)
    shown = [client.get(f"/api/jobs/{job['id']}").json() for job in jobs]
    assert [(job["state"], job["position"]) for job in shown] == [("running", 0), ("queued", 1), ("queued", 2)]
    assert client.delete(f"/api/jobs/{jobs[1]['id']}").json()["state"] == "canceled"
    assert client.get(f"/api/jobs/{jobs[2]['id']}").json()["position"] == 1
    client.delete(f"/api/jobs/{jobs[0]['id']}")
    go_on.set()
    over = [finished(client, job) for job in jobs]
    assert [job["state"] for job in over] == ["canceled", "canceled", "done"]
    assert (over[0]["step"], over[2]["step"], over[2]["steps"]) == (1, 5, 5)
    assert [result["seed"] for result in client.get("/api/state").json()["results"]] == [2]


def test_a_session_cannot_fill_the_queue(studio, pipeline):
    client = studio.browser()
    mask = mask_of(client, mask_image((6, 5, 4)))
    go_on = threading.Event()
    studio.worker.submit("somebody else", str(pipeline), lambda *_: go_on.wait(PATIENCE))
    answers = [client.post("/api/jobs", json={"mask": mask["id"]}) for _ in range(9)]
    assert [answer.status_code for answer in answers] == [202] * 8 + [400]
    for answer in answers[:-1]:
        client.delete(f"/api/jobs/{answer.json()['id']}")
    go_on.set()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"seed": -1}, "the seed is a whole number"),
        ({"seed": 1.5}, "the seed is a whole number"),
        ({"steps": "many"}, "steps are a whole number"),
        ({"guidance": "much"}, "guidance is a number"),
        ({"mask": "77"}, "has no mask 77"),
        ({"shape": [1, 2]}, "three whole numbers"),
        ({"classes": 3}, "classes are an object"),
        ({"images": {"MR": "4"}}, "has no image 4"),
    ],
)
def test_requests_that_mean_nothing_are_refused(browser, body, message):
    answer = browser.post("/api/jobs", json=body)
    assert answer.status_code in (400, 404) and message in answer.json()["error"]


def test_what_the_model_refuses_is_said(browser):
    mask = mask_of(browser, mask_image((6, 5, 4)))
    job = finished(browser, browser.post("/api/jobs", json={"mask": mask["id"], "classes": {"sex": "F"}}).json())
    assert job["state"] == "failed" and "classes names sex" in job["message"]
    job = finished(browser, browser.post("/api/jobs", json={}).json())
    assert job["state"] == "failed" and "this model is conditioned on a mask" in job["message"]


def test_bodies_that_are_no_json_are_refused(browser):
    for content in (b"{", b"[]", b"[" * 100_000, b"\xff"):
        assert browser.post("/api/jobs", content=content).status_code == 400
    assert browser.post("/api/jobs", content=b" " * (2 << 20)).status_code == 413


def test_an_edit_keeps_the_rest_of_a_volume(browser, tmp_path, monkeypatch):
    mask = mask_of(browser, nib.Nifti1Image(np.full((24, 10, 8), 2, np.int16), np.eye(4)))
    first = generated(browser, mask=mask["id"], seed=1)
    refused = finished(
        browser, browser.post("/api/jobs", json={"mask": mask["id"], "edit": {"result": first["id"]}}).json()
    )
    assert refused["state"] == "failed" and refused["message"] == "the mask is that of #1; paint what is to change"

    drawing = bytearray(browser.get(f"/api/masks/{mask['id']}/drawing").content)
    drawing[0:3] = b"\x02" * 3  # the first voxels: code 2 is label 5
    mask = browser.post(f"/api/masks/{mask['id']}/paint", content=bytes(drawing)).json()["mask"]
    second = generated(browser, mask=mask["id"], seed=4, edit={"result": first["id"], "strength": 0.7})
    assert second["edited"] and not first["edited"]
    folder = unpacked(browser, f"/api/results/{second['id']}/download", tmp_path / "pair")
    before, after = (nib.load(folder / f"{name}_000.nii.gz").get_fdata() for name in ("case", "case_v2"))
    region = nib.load(folder / "case_v2_region.nii.gz").get_fdata() != 0
    assert 0 < region.sum() < region.size and not region[9:].any() and region[:8, 0, 0].all()
    assert np.array_equal(before[~region], after[~region]) and (before[region] != after[region]).any()

    monkeypatch.chdir(folder)
    exec((folder / "again.py").read_text(), {})
    words = shlex.split((folder / "again.sh").read_text())
    assert words[:2] == ["medvolume", "edit"]
    edit_command.main(words[2:])
    for other in (folder / "case_v2_000_again.nii.gz", folder / "again" / "case_v2_000.nii.gz"):
        assert np.array_equal(nib.load(other).get_fdata(), after)


# The collection


def test_the_collection_is_downloaded(browser, tmp_path):
    assert browser.get("/api/collection.zip").json()["error"].startswith("the collection is empty")
    mask = mask_of(browser, mask_image((6, 5, 4)))
    results = [generated(browser, mask=mask["id"], seed=seed) for seed in range(3)]
    for result in results[1:]:
        assert browser.post(f"/api/results/{result['id']}/accept", json={"accepted": True}).json()["accepted"]
    folder = unpacked(browser, "/api/collection.zip", tmp_path / "collection")
    assert sorted(path.name for path in folder.iterdir()) == ["002_case_000", "003_case_000"]
    raw = unpacked(browser, "/api/nnunet.zip", tmp_path / "nnunet") / "Dataset501_Studio"
    assert sorted(path.name for path in (raw / "imagesTr").iterdir()) == [
        "case_001_0000.nii.gz",
        "case_002_0000.nii.gz",
    ]
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 2
    for number, place in ((1, "002_case_000"), (2, "003_case_000")):
        image = nib.load(raw / f"imagesTr/case_{number:03d}_0000.nii.gz").get_fdata()
        assert np.array_equal(image, nib.load(folder / place / "case_000.nii.gz").get_fdata())
        labels = nib.load(raw / f"labelsTr/case_{number:03d}.nii.gz").get_fdata()
        stored = nib.load(folder / place / "case.nii.gz").get_fdata()
        assert np.array_equal(labels, np.vectorize({0: 0, 2: 1, 5: 2}.get)(stored.astype(int)))


def test_idle_sessions_end_with_their_files(studio):
    client = studio.browser()
    mask_of(client, mask_image((6, 5, 4)))
    sessions = studio.sessions
    sessions.end_idle()
    assert client.get("/api/state").status_code == 200
    next(iter(sessions.open.values())).last -= 13 * 3600
    sessions.end_idle()
    assert client.get("/api/state").status_code == 403 and list(sessions.folder.iterdir()) == []


# Other models


def test_classes_and_numbers_make_the_same_volume_again(tmp_path, monkeypatch):
    folder = tmp_path / "conditioned"
    stats = {"mean": 50.0, "std": 10.0, "low": 20.0, "high": 80.0}
    conditioned(folder, stats)
    studio = RunningStudio([folder], tmp_path / "sessions")
    client = studio.browser()
    shown = client.get("/api/state").json()["pipeline"]
    assert (shown["classes"], shown["mask"]) == ({"sex": ["F", "M"]}, "required")
    mask = mask_of(client, mask_image((6, 5, 4)))
    result = generated(client, mask=mask["id"], seed=3, classes={"sex": "F"}, numbers={"age": 63})
    pair = unpacked(client, f"/api/results/{result['id']}/download", tmp_path / "pair")
    monkeypatch.chdir(pair)
    exec((pair / "again.py").read_text(), {})
    generate_command.main(shlex.split((pair / "again.sh").read_text())[2:])
    ours = nib.load(pair / "case_000.nii.gz").get_fdata()
    assert np.array_equal(ours, nib.load(pair / "case_000_again.nii.gz").get_fdata())
    assert np.array_equal(ours, nib.load(pair / "again/case_000.nii.gz").get_fdata())
    studio.worker.close()


def conditioned(folder, stats):
    """Save a tiny pipeline that knows sex and age."""
    base = tiny_pipeline()
    config = {
        **base.unet.config,
        "classes": {"sex": ["F", "M"]},
        "numbers": {"age": {key: stats[key] for key in ("mean", "std")}},
    }
    unet = LatentUNet3D.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    data = {**base.data.to_json(), "classes": {"sex": ["F", "M"]}, "numbers": {"age": stats}}
    MedVolumePipeline(base.vae, unet.eval(), base.scheduler, data).save_pretrained(folder)


def test_label_maps_are_generated_and_shown(tmp_path, monkeypatch):
    """The model of masks in weights/: broken maps are generated again from the next seed, as by the command."""
    studio = RunningStudio([ROOT / "weights/hippocampus-masks"], tmp_path / "sessions")
    client = studio.browser()
    shown = client.get("/api/state").json()["pipeline"]
    assert (shown["mask"], shown["maps"], [label["value"] for label in shown["labels"]]) == ("none", True, [0, 1, 2])
    result = generated(client, seed=2)
    assert result["maps"] and result["name"] == "map_000"
    folder = unpacked(client, f"/api/results/{result['id']}/download", tmp_path / "map")
    values = nib.as_closest_canonical(nib.load(folder / "map_000.nii.gz")).get_fdata()
    drawing = np.frombuffer(client.get(f"/api/results/{result['id']}/drawing").content, np.uint8)
    assert np.array_equal(drawing.reshape(result["shape"], order="F"), values) and {*np.unique(values)} == {0, 1, 2}
    monkeypatch.chdir(folder)
    exec((folder / "again.py").read_text(), {})
    generate_command.main(shlex.split((folder / "again.sh").read_text())[2:])
    for other in (folder / "map_000_again.nii.gz", folder / "again/map_000.nii.gz"):
        assert np.array_equal(nib.as_closest_canonical(nib.load(other)).get_fdata(), values)
    studio.worker.close()


def test_a_mask_is_generated_to_start_from(tmp_path):
    masks, volumes = ROOT / "weights/hippocampus-masks", ROOT / "weights/hippocampus"
    studio = RunningStudio([volumes], tmp_path / "sessions", mask_pipeline=str(masks))
    client = studio.browser()
    assert client.get("/api/state").json()["new_masks"]
    job = finished(client, client.post("/api/jobs", json={"new_mask": True, "seed": 2}).json())
    assert job["state"] == "done" and job["mask"]["name"] == "map_seed2" and job["result"] is None
    drawing = np.frombuffer(client.get(f"/api/masks/{job['mask']['id']}/drawing").content, np.uint8)
    generate_command.main(["--pipeline", str(masks), "--output", str(tmp_path / "map"), "--seed", "2"])
    values = nib.as_closest_canonical(nib.load(tmp_path / "map/map_000.nii.gz")).get_fdata()
    assert np.array_equal(drawing.reshape(job["mask"]["shape"], order="F"), values)
    result = generated(client, mask=job["mask"]["id"], steps=2)
    assert result["shape"] == job["mask"]["shape"]
    studio.worker.close()


def test_a_studio_without_masks_says_so(browser):
    answer = browser.post("/api/jobs", json={"new_mask": True})
    assert answer.status_code == 400 and "start it with --mask_pipeline" in answer.json()["error"]


def test_a_package_of_another_layout_is_refused(tmp_path):
    from studio.niivue import with_export

    file = tmp_path / "widget.js"
    file.write_text('if(!v){console.log("Creating new Niivue instance");let B=A.get("opts")??{};v=new t2(B)}')
    assert with_export(file).endswith("\nexport{t2 as Niivue};\n")
    file.write_text("export default 1")
    with pytest.raises(ValueError, match=r"another layout than the studio knows; pip install ipyniivue==2\.4\.4"):
        with_export(file)
