"""A studio of tiny pipelines, for the tests of its server and of its page, and what a browser asks of it."""

import gzip
import io
import json
import time
import zipfile
from functools import cache

import nibabel as nib
from tiny import mask_image, tiny_pipeline

from medvolume import MedVolumePipeline
from studio.session import Sessions
from studio.worker import Worker

TOKEN = "a-token"
STUB = "export const Niivue = 0;\n"  # for the viewer, which tests without a browser do not need
PATIENCE = 240  # seconds at most: cores are shared, and the browser's renderer is software


def save_tiny_pipeline(folder, steps=3, **changes):
    """Save a pipeline with settings of its own and one example; changes are those of `tiny_pipeline`."""
    tiny_pipeline(**changes).save_pretrained(folder)
    (folder / "sampling.json").write_text(json.dumps({"num_inference_steps": steps}))
    (folder / "masks").mkdir()
    nib.save(mask_image((8, 10, 12)), folder / "masks" / "first.nii.gz")
    (folder / "examples.csv").write_text("mask\nmasks/first.nii.gz\n")
    return folder


@cache
def loaded(folder):
    """The pipeline of a folder, loaded once for all tests."""
    pipe = MedVolumePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class RunningStudio:
    """A studio of the pipelines in some folders, the first of which is loaded. `failures` are faults of its worker."""

    def __init__(self, pipelines, folder, niivue=STUB, load=loaded, **settings):
        from studio.app import Studio, make_app  # here: starlette is of an extra

        folder.mkdir(exist_ok=True)
        self.failures = []
        names = [*map(str, pipelines)]
        self.worker = Worker(load, names[0], self.failures.append)
        self.sessions = Sessions(folder)
        self.app = make_app(Studio(names, self.worker, self.sessions, TOKEN, niivue, **settings))
        assert self.worker.loaded.wait(PATIENCE), self.failures

    def browser(self):
        """A browser that has its token."""
        from starlette.testclient import TestClient

        client = TestClient(self.app, base_url="http://127.0.0.1:7860")
        assert client.get(f"/?token={TOKEN}").status_code == 200
        return client


def upload(client, **files):
    """Upload files, {name with _ for the dot before the suffix: bytes}, as one volume."""
    number = client.post("/api/uploads").json()["upload"]
    for name, data in files.items():
        answer = client.put(f"/api/uploads/{number}", params={"name": name}, content=data)
        assert answer.status_code == 200, answer.text
    return number


def mask_of(client, image, name="case.nii.gz"):
    answer = client.post("/api/masks", json={"upload": upload(client, **{name: gzip.compress(image.to_bytes())})})
    assert answer.status_code == 200, answer.text
    return answer.json()["mask"]


def finished(client, job):
    """Wait for a job to be over; return it."""
    end = time.monotonic() + PATIENCE
    while job["state"] in ("queued", "running"):
        assert time.monotonic() < end, job
        time.sleep(0.05)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def generated(client, **body):
    job = client.post("/api/jobs", json=body)
    assert job.status_code == 202, job.text
    job = finished(client, job.json())
    assert job["state"] == "done", job
    return job["result"]


def unpacked(client, path, folder):
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        packed.extractall(folder)
    return folder
