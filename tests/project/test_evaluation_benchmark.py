"""benchmarks/generation.py on a pipeline of a few channels."""

import json

import pytest
import torch

from autoencoder import AutoencoderKL3D
from benchmarks import generation
from diffusion import LatentUNet3D, make_scheduler
from pipelines import MedVolumePipeline
from volumes import DataConfig, PhantomConfig, VolumeDataset, describe, load_cases, make_phantom, write_volume


@pytest.fixture
def pipeline(tmp_path):
    """A saved pipeline, untrained, with two example masks."""
    config = DataConfig(phantom=PhantomConfig(count=2, shape=(16, 16, 16)), validation_fraction=0.0)
    dataset = VolumeDataset(load_cases(config), config)
    vae = AutoencoderKL3D(channels=(4, 8), latent_channels=2, encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    unet = LatentUNet3D(
        in_channels=2,
        out_channels=2,
        channels=(8,),
        strides=(),
        blocks=(1,),
        attention=(False,),
        num_labels=dataset.num_labels,
        mask_width=4,
    )
    vae.set_latent_statistics([0.0] * vae.config["latent_channels"], [1.0] * vae.config["latent_channels"])
    pipe = MedVolumePipeline(vae=vae, unet=unet, scheduler=make_scheduler("rectified_flow"), data=describe(dataset))
    pipe.save_pretrained(tmp_path / "pipeline")
    for seed, shape in enumerate([(16, 16, 16), (16, 14, 18)]):
        write_volume(make_phantom(seed, shape)[1], tmp_path / "pipeline" / "masks" / f"case_{seed}.nii.gz")
    return tmp_path / "pipeline"


@pytest.mark.filterwarnings("ignore:.*outside of what the model was trained on")
def test_the_report_has_every_part_and_they_add_up(pipeline, tmp_path, capsys):
    args = ["--pipeline", str(pipeline), "--steps", "2", "--repeats", "2", "--precision", "no", "--device", "cpu"]
    report = generation.main([*args, "--output", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert (report["steps"], report["network_calls"]) == (2, 2)
    assert report["masks"] == {"case_0.nii.gz": [16, 16, 16], "case_1.nii.gz": [16, 14, 18]}
    seconds = report["seconds_per_volume"]
    assert set(seconds) == {"whole", "batched", "denoising", "decoding"}
    assert all(0 < part["min"] <= part["median"] <= part["max"] for part in seconds.values())
    assert report["parameters"]["unet"] > 0 and "whole" in capsys.readouterr().out


def test_missing_masks_are_named(tmp_path):
    with pytest.raises(ValueError, match="masks: no masks.*--masks"):
        generation.find_masks(tmp_path, None)


def test_seconds_are_counted_until_the_work_is_done():
    seconds, result = generation.seconds_of(torch.device("cpu"), lambda: sum(range(200_000)))
    assert result == 199_999 * 100_000 and seconds > 0
    assert generation.summary([3.0, 1.0, 2.0, 6.0]) == {"median": 2.5, "mean": 3.0, "min": 1.0, "max": 6.0}
