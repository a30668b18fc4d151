"""evaluate.py reconstruction and the benchmark, on models whose answer is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from planted_volumes import plant
from shifted_coder import ShiftedCoder

import evaluate
from autoencoder import VQGAN3D, AutoencoderKL3D
from evaluation import codebook_report, evaluate_reconstruction, reconstruct
from evaluation.report import write_report
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases, pad_sample


@pytest.fixture
def phantoms():
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(30, 34, 31)), validation_fraction=0.0)
    return VolumeDataset(load_cases(config), config)


def test_a_known_error_gives_its_psnr(phantoms):
    """0.02 in [-1, 1] is 0.01 in [0, 1]: 40 dB, whatever happens in the padding; brightness leaves the spectrum
    alone."""
    for index in range(3):  # clipped, so that nothing is clamped
        plant(phantoms, index, lambda case: np.clip(case.image.array, -0.9, 0.9, out=case.image.array))
    seen = []
    result = evaluate_reconstruction(
        ShiftedCoder(0.02, padding=0.5), phantoms, on_volume=lambda name, value: seen.append((name, value))
    )
    assert result["volumes"] == 3
    assert result["psnr_db"]["mean"] == pytest.approx(40, abs=1e-3)
    assert dict(seen) == result["psnr_db"]["per_volume"]
    assert list(result["spectrum"]["ratio_db"].values()) == pytest.approx([0] * 10, abs=1e-4)
    assert result["sharpness"] == pytest.approx(1, abs=1e-5) and "codebook" not in result


def test_a_blur_is_less_sharp(phantoms):
    class Blur(ShiftedCoder):
        def decode(self, latents):
            return SimpleNamespace(sample=torch.nn.functional.avg_pool3d(latents, 3, 1, 1))

    assert 0.2 < evaluate_reconstruction(Blur(0.0), phantoms)["sharpness"] < 0.9


def test_codes_of_known_use():
    """Codes 0 and 1 in equal parts, of 8: 3 bits an index, 1 bit of entropy, two codes in effect."""
    report = codebook_report(torch.tensor([2, 2, 0, 0, 0, 0, 0, 0]), (4, 4, 2))
    assert report == pytest.approx(
        {
            "codes": 8,
            "cells": 4,
            "usage": 0.25,
            "perplexity": 2.0,
            "bits_per_cell": 3.0,
            "entropy_bits_per_cell": 1.0,
            "bits_per_voxel": 3 / 32,
        },
        rel=1e-5,
    )


def test_a_vqgans_codes_are_in_the_report(tmp_path, capsys):
    """An encoder that says 0.1 everywhere takes the nearest of four codes, in each of 8 x 8 x 8 cells of two
    volumes."""
    vae = VQGAN3D(channels=(4, 8), latent_channels=1, num_codes=4, encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    with torch.no_grad():
        vae.encoder[-1].weight.zero_()
        vae.encoder[-1].bias.fill_(0.1)
    vae.codebook.codes.copy_(torch.tensor([[0.0], [5.0], [6.0], [7.0]]))
    vae.set_latent_statistics([0.0], [1.0])
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump({"data": {"phantom": {"count": 2, "shape": [29, 30, 30]}}}))
    args = ["reconstruction", "--config", str(tmp_path / "vae.yaml"), "--vae", str(tmp_path), "--split", "train"]
    args += ["--data.validation_fraction", "0", "--output", str(tmp_path / "r.json")]
    found = evaluate.main([*args, "--precision", "no", "--device", "cpu"])["codebook"]
    assert (found["usage"], found["perplexity"], found["cells"]) == (0.25, pytest.approx(1), 2 * 8 * 8 * 8)
    line = "25.0% of 4 codes used, perplexity 1, 2.00 bits per latent voxel (entropy 0.00), 0.031 bits per voxel"
    assert line in capsys.readouterr().out


def test_reconstructions_are_clamped():
    """What comes back brighter than the brightest is as good as exact."""
    assert torch.equal(reconstruct(ShiftedCoder(-0.5), torch.ones(1, 4, 4, 4)), torch.ones(1, 4, 4, 4))


def test_the_command_reads_config_and_weights(tmp_path, capsys):
    vae = AutoencoderKL3D(channels=(4, 8), latent_channels=2, encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    vae.set_latent_statistics([0.0, 0.0], [1.0, 1.0])
    vae.save_pretrained(tmp_path / "run" / "vae")
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump({"data": {"phantom": {"count": 4, "shape": [30, 30, 30]}}}))
    args = ["reconstruction", "--config", str(tmp_path / "vae.yaml"), "--output", str(tmp_path / "out" / "report.json")]
    args += ["--precision", "no", "--split", "validation", "--device", "cpu"]
    report = evaluate.main([*args, "--vae", str(tmp_path / "run"), "--data.validation_fraction", "0.5"])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["volumes"] == 2 and report["data"]["validation_fraction"] == 0.5
    config = DataConfig(phantom=PhantomConfig(count=4, shape=(30, 30, 30)), validation_fraction=0.5)
    held_out = [case for case in load_cases(config) if case.split == "validation"]
    for item in map(VolumeDataset(held_out, config).__getitem__, range(2)):
        sample = pad_sample(item, 4)
        error = (reconstruct(vae.eval(), sample["image"]) - sample["image"])[sample["fov"]] / 2  # of [0, 1]
        expected = -10 * np.log10((error.double() ** 2).mean().item())
        assert report["psnr_db"]["per_volume"][item["name"]] == pytest.approx(expected, abs=1e-3)
    assert "report.json" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no case is in split 'test'.*vae.yaml"):
        evaluate.main([*args, "--vae", str(tmp_path / "run"), "--split", "test"])
    with pytest.raises(ValueError, match="nowhere: no autoencoder there"):
        evaluate.main([*args, "--vae", str(tmp_path / "nowhere")])


def test_reports_are_written_whole(tmp_path):
    write_report(tmp_path / "a" / "report.json", {"x": 1})
    with pytest.raises(TypeError):
        write_report(tmp_path / "a" / "report.json", {"x": object()})
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == {"x": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.json"]
