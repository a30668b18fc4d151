"""Both trainings on cases that are cut to the box of their foreground (`data.crop`), to a pipeline that knows it."""

import json

import numpy as np
import pytest
import torch
from short_runs import run

import train_ldm
import train_vae
from pipelines import MedVolumePipeline, VolumeRequest
from pipelines.sampling import SamplingConfig
from volumes import ForegroundCrop, make_phantom
from volumes.foreground import image_box

CROP = ForegroundCrop(200, "image", 1.0)
DATA = ["--data.phantom={count: 6, shape: [20, 20, 20]}", "--loop.max_steps=1", "--loop.validate_every=0"]
WORDS = [*DATA, "--data.crop={above: 200, margin: 1}"]


def test_a_step_of_both_trainings_and_a_volume(tmp_path):
    run(train_vae, tmp_path / "vae", *WORDS)
    facts = json.loads((tmp_path / "vae/vae/config.json").read_text())["data"]
    assert facts["crop"] == {"above": 200, "channel": "image", "margin": 1.0}
    run(train_ldm, tmp_path / "ldm", f"--vae={tmp_path / 'vae/vae'}", *DATA)  # the crop is the autoencoder's
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "ldm/pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.data.crop == CROP and max(pipe.data.shape_range[1]) <= 20 and min(pipe.data.shape_range[0]) < 20
    image, mask, _ = make_phantom(3, (20, 20, 20))
    [volume] = pipe.prepare([VolumeRequest(mask, box_image=image)], SamplingConfig(1))
    [sample] = pipe.generate([volume], SamplingConfig(1), [torch.Generator().manual_seed(0)])
    box = image_box(image, CROP)
    assert sample.record.box["shape"] == list(box.target) and sample.output.shape == (20, 20, 20)
    outside = np.ones((20, 20, 20), bool) & ~box.undo(np.ones(box.target, bool), False)
    values = np.asarray(sample.output.dataobj)
    assert outside.any() and np.ptp(values[outside]) == 0 and np.ptp(values[~outside]) > 0
    with pytest.raises(
        ValueError, match="crop: it learned the box of what is above 200, and 1 mm, the data has whole volumes"
    ):
        run(train_ldm, tmp_path / "other", f"--vae={tmp_path / 'vae/vae'}", *DATA, "--data.crop=null")
