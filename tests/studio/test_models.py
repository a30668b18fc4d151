"""Several models in one studio: each job names its own, one is in memory, and those that do not fit are refused."""

import json
import shlex
import threading
import weakref

import nibabel as nib
import numpy as np
import pytest
from studios import PATIENCE, RunningStudio, finished, generated, loaded, mask_of, save_tiny_pipeline, unpacked
from tiny import mask_image

import generate as generate_command
from studio.models import short_names

pytest.importorskip("starlette.testclient", reason="needs the extra studio")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "teacher"))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return str(save_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "student", steps=2, seed=1))


class Loads:
    """Loads pipelines: `names` in order, and who of them is still in memory: nobody, when the next one is loaded. It
    waits for `go_on`, which is set."""

    def __init__(self):
        self.names, self.parts = [], []
        self.began, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self, name):
        assert self.in_memory == []
        self.names.append(name)
        self.began.set()
        assert self.go_on.wait(PATIENCE)
        pipe = loaded.__wrapped__(name)
        self.parts += [(name, weakref.ref(part)) for part in (pipe, pipe.unet, pipe.vae)]
        return pipe

    @property
    def in_memory(self):
        return sorted({name for name, part in self.parts if part() is not None})


@pytest.fixture
def loads():
    return Loads()


@pytest.fixture
def studio(teacher, student, tmp_path, loads):
    studio = RunningStudio([teacher, student], tmp_path / "sessions", load=loads)
    yield studio
    studio.worker.close()
    assert studio.failures == []


@pytest.fixture
def browser(studio):
    return studio.browser()


def message_of(client, **body):
    """Why a job failed."""
    job = finished(client, client.post("/api/jobs", json=body).json())
    assert job["state"] == "failed", job
    return job["message"]


def model_of(client, name):
    """What the page is told of a model; None before it was loaded."""
    answer = client.get("/api/model", params={"name": name})
    assert answer.status_code == 200, answer.text
    return answer.json()["pipeline"]


def test_a_volume_is_of_the_model_that_its_job_names(browser, teacher, student, tmp_path, monkeypatch):
    state = browser.get("/api/state").json()
    titles = [{"name": teacher, "title": "teacher"}, {"name": student, "title": "student"}]
    assert (state["models"], state["pipeline"]["name"]) == (titles, teacher)
    mask = mask_of(browser, mask_image((8, 8, 6)))["id"]
    asked = [{}, {"model": student}, {"model": teacher, "steps": 2}]
    results = [generated(browser, mask=mask, seed=7, **body) for body in asked]
    assert [(result["model"], result["steps"]) for result in results] == [(teacher, 3), (student, 2), (teacher, 2)]
    for number, result in enumerate(results):
        folder = unpacked(browser, f"/api/results/{result['id']}/download", tmp_path / str(number))
        words = shlex.split((folder / "again.sh").read_text())
        assert words[words.index("--pipeline") + 1] == result["model"] and ("--steps" in words) == (number == 2)
        text = browser.get(f"/api/results/{result['id']}/again").json()
        assert text["command"] == shlex.join(words) and repr(result["model"]) in text["python"]
        monkeypatch.chdir(folder)
        generate_command.main(words[2:])
        exec((folder / "again.py").read_text(), {})
        ours = nib.load(folder / "case_000.nii.gz").get_fdata()
        for other in ("case_000_again.nii.gz", "again/case_000.nii.gz"):
            assert np.array_equal(nib.load(folder / other).get_fdata(), ours)
        assert json.loads((folder / "case_000.json").read_text())["model"] == loaded(result["model"]).model_hash
    volumes = [browser.get(f"/api/results/{result['id']}/view").content for result in results]
    assert len(set(volumes)) == 3


def test_one_model_is_in_memory(browser, loads, teacher, student):
    """The other is freed: nothing of sessions, results or finished jobs keeps it."""
    mask = mask_of(browser, nib.Nifti1Image(np.full((12, 8, 6), 2, np.int16), np.eye(4)))["id"]
    first = generated(browser, mask=mask)
    drawing = bytearray(browser.get(f"/api/masks/{mask}/drawing").content)
    drawing[0] = 2
    painted = browser.post(f"/api/masks/{mask}/paint", content=bytes(drawing)).json()["mask"]["id"]
    assert generated(browser, mask=painted, edit={"result": first["id"]})["edited"]
    assert message_of(browser, mask=mask, classes={"sex": "F"})  # an error holds the frames that it came from
    assert loads.in_memory == [teacher]
    assert generated(browser, mask=mask, model=student)["model"] == student
    assert loads.in_memory == [student]
    edited = generated(browser, mask=painted, model=student, edit={"result": first["id"]})
    assert edited["edited"] and edited["model"] == student
    generated(browser, mask=mask)
    assert (loads.names, loads.in_memory) == ([teacher, student, teacher], [teacher])


def test_models_are_loaded_in_the_order_of_the_queue(studio, loads, teacher, student):
    """Two sessions use two models; a canceled job has nothing loaded."""
    one, other = studio.browser(), studio.browser()
    masks = {client: mask_of(client, mask_image((6, 5, 4)))["id"] for client in (one, other)}
    begin = threading.Event()
    studio.worker.submit("somebody else", teacher, lambda *_: begin.wait(PATIENCE))
    queued = [(one, student), (other, student), (one, teacher), (other, student), (one, teacher)]
    jobs = [
        (client, client.post("/api/jobs", json={"mask": masks[client], "model": name}).json())
        for client, name in queued
    ]
    other.delete(f"/api/jobs/{jobs[3][1]['id']}")
    begin.set()
    over = [finished(client, job) for client, job in jobs]
    assert [job["state"] for job in over] == ["done", "done", "done", "canceled", "done"]
    assert [job["result"]["model"] for job in over if job["result"]] == [student, student, teacher, teacher]
    assert loads.names == [teacher, student, teacher]


def test_a_job_says_that_its_model_is_loaded(browser, loads, student):
    assert model_of(browser, student) is None
    loads.began.clear()
    loads.go_on.clear()
    job = browser.post("/api/jobs", json={"model": student, "load": True}).json()
    assert loads.began.wait(PATIENCE)
    shown = browser.get(f"/api/jobs/{job['id']}").json()
    assert (shown["state"], shown["loading"]) == ("running", "student")
    browser.delete(f"/api/jobs/{job['id']}")
    loads.go_on.set()
    assert finished(browser, job)["state"] == "canceled"
    job = finished(browser, browser.post("/api/jobs", json={"model": student, "load": True}).json())
    assert (job["state"], job["loading"], job["result"]) == ("done", None, None)
    shown = model_of(browser, student)
    assert (shown["name"], shown["steps"]) == (student, 2)
    assert len(loads.names) == 2  # it was in memory already


def test_models_that_are_not_served_are_unknown(browser, tmp_path):
    for answer in (
        browser.get("/api/model", params={"name": str(tmp_path)}),
        browser.post("/api/jobs", json={"model": str(tmp_path)}),
        browser.post("/api/jobs", json={"model": ["teacher"]}),
    ):
        assert answer.status_code == 404 and "this studio has no model" in answer.json()["error"]


def test_a_model_that_cannot_be_loaded_fails_its_job(teacher, tmp_path):
    """The studio stays, and the next job loads the model that was freed."""
    nowhere = str(tmp_path / "nowhere")
    studio = RunningStudio([teacher, nowhere], tmp_path / "sessions", load=Loads())
    client = studio.browser()
    mask = mask_of(client, mask_image((6, 5, 4)))["id"]
    assert nowhere in message_of(client, mask=mask, model=nowhere)
    assert nowhere in message_of(client, model=nowhere, load=True)
    assert model_of(client, nowhere) is None
    assert generated(client, mask=mask)["model"] == teacher
    studio.worker.close()
    assert studio.failures == []


SCALE = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [0.5, 99.5]}
OTHERS = {
    "labels": {"0": "background", "2": "anterior", "5": "tail"},
    "channels": ["CT"],
    "intensity": [SCALE | {"high": 310.0}],
    "reading": {"axes": "CXYZ"},
}


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("labels", "labels (5 = tail; there 5 = posterior)"),
        ("channels", "channels (CT; there MR)"),
        ("intensity", "windows (100.0 to 310.0; there 100.0 to 300.0)"),
        ("reading", "reading of headers (axes = CXYZ; there none)"),
    ],
)
def test_models_that_do_not_fit_are_refused(teacher, tmp_path, what, difference):
    other = str(save_tiny_pipeline(tmp_path / "other", **{what: OTHERS[what]}))
    studio = RunningStudio([teacher, other], tmp_path / "sessions")
    client = studio.browser()
    mask = mask_of(client, mask_image((6, 5, 4)))["id"]
    expected = f"{other} differs from {teacher}: {difference}; start a second studio for it"
    assert message_of(client, mask=mask, model=other) == expected
    for body in ({"mask": mask, "model": other}, {"load": True, "model": other}):  # now it is known: at once
        answer = client.post("/api/jobs", json=body)
        assert (answer.status_code, answer.json()["error"]) == (400, expected)
    assert client.get("/api/model", params={"name": other}).json() == {"error": expected}
    assert generated(client, mask=mask)["model"] == teacher
    studio.worker.close()


def test_models_of_other_conditions_and_spacings_fit(teacher, tmp_path):
    coarse = [[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    changes = {"spacing": [2.0, 2.0, 2.0], "affine": coarse, "partial_masks": 0.3, "condition_dropout": {"mask": 0.1}}
    other = str(save_tiny_pipeline(tmp_path / "other", **changes))
    studio = RunningStudio([teacher, other], tmp_path / "sessions")
    client = studio.browser()
    mask = mask_of(client, mask_image((12, 12, 12)))
    result = generated(client, mask=mask["id"], model=other)
    assert result["shape"] == mask["shape"] and "has a spacing of 1 x 1 x 1 mm" in " ".join(result["warnings"])
    shown = [model_of(client, name) for name in (teacher, other)]
    assert [(one["partial"], one["mask"], one["guides"]) for one in shown] == [
        (False, "required", False),
        (True, "optional", True),
    ]
    unknown = client.post(f"/api/masks/{mask['id']}/paint", content=b"\xfe" * 12**3).json()["mask"]
    assert "whole masks" in message_of(client, mask=unknown["id"])
    assert generated(client, mask=unknown["id"], model=other)["mask"] == unknown["id"]
    studio.worker.close()


def test_a_collection_names_the_model_of_each_pair(browser, teacher, student, tmp_path):
    mask = mask_of(browser, mask_image((6, 5, 4)))["id"]
    for name in (teacher, student):
        result = generated(browser, mask=mask, model=name)
        browser.post(f"/api/results/{result['id']}/accept", json={"accepted": True})
    hashes = [loaded(name).model_hash for name in (teacher, student)]
    folder = unpacked(browser, "/api/collection.zip", tmp_path / "collection")
    pairs = [folder / "001_case_000", folder / "002_case_000"]
    assert [name in (pair / "again.sh").read_text() for pair in pairs for name in (teacher, student)] == [
        True,
        False,
        False,
        True,
    ]
    assert [json.loads((pair / "case_000.json").read_text())["model"] for pair in pairs] == hashes
    raw = unpacked(browser, "/api/nnunet.zip", tmp_path / "nnunet") / "Dataset501_Studio"
    sidecars = [json.loads((raw / f"sidecars/case_00{number}.json").read_text()) for number in (1, 2)]
    assert [sidecar["model"] for sidecar in sidecars] == hashes
    assert json.loads((raw / "dataset.json").read_text())["models"] == sorted(hashes)
    for number, pair in enumerate(pairs, start=1):
        exported = nib.load(raw / f"imagesTr/case_00{number}_0000.nii.gz").get_fdata()
        assert np.array_equal(exported, nib.load(pair / "case_000.nii.gz").get_fdata())


def test_titles_tell_models_apart():
    assert short_names(["weights/hippocampus", "weights/hippocampus-fast"]) == {
        "weights/hippocampus": "hippocampus",
        "weights/hippocampus-fast": "hippocampus-fast",
    }
    assert list(short_names(["/runs/1/best", "/runs/2/best", "us/best"]).values()) == ["1/best", "2/best", "us/best"]
