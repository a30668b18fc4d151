"""A studio of a tiny pipeline, for the tests of its server and of its page."""

import json
from functools import cache

import nibabel as nib
from tiny import mask_image, tiny_pipeline

from medvolume import MedVolumePipeline
from studio.session import Sessions
from studio.worker import Worker

TOKEN = "a-token"
PATIENCE = 240  # seconds at most: cores are shared, and the browser's renderer is software


def save_tiny_pipeline(folder):
    """Save a pipeline with settings of its own and one example."""
    tiny_pipeline().save_pretrained(folder)
    (folder / "sampling.json").write_text(json.dumps({"num_inference_steps": 3}))
    (folder / "masks").mkdir()
    nib.save(mask_image((8, 10, 12)), folder / "masks" / "first.nii.gz")
    (folder / "examples.csv").write_text("mask\nmasks/first.nii.gz\n")
    return folder


class RunningStudio:
    """A studio of the pipeline in a folder, whose model is loaded. `failures` are faults of its worker."""

    def __init__(self, pipeline, folder, niivue, **settings):
        from studio.app import Studio, make_app  # here: starlette is of an extra

        folder.mkdir(exist_ok=True)
        self.failures = []
        self.worker = Worker(lambda: loaded(pipeline), self.failures.append)
        self.sessions = Sessions(folder)
        self.app = make_app(Studio(str(pipeline), self.worker, self.sessions, TOKEN, niivue, **settings))
        assert self.worker.loaded.wait(PATIENCE), self.failures


@cache
def loaded(folder):
    """The pipeline of a folder, loaded once for all tests."""
    pipe = MedVolumePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
