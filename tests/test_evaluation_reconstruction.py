"""evaluate.py reconstruction and the benchmark, on models whose answer is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import evaluate
from autoencoder import AutoencoderKL3D
from evaluation import evaluate_reconstruction, reconstruct
from evaluation.report import write_report
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases


class ShiftedCoder:
    """An autoencoder that gives every voxel back, darker by `shift`, and draws nonsense in the padding."""

    stride, device, dtype = (4, 4, 4), torch.device("cpu"), torch.float32

    def __init__(self, shift: float):
        self.shift = shift

    def encode(self, image):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: image))

    def decode(self, latents):
        padding = (latents == -1).float()
        return SimpleNamespace(sample=latents - self.shift + 2 * self.shift * padding)


@pytest.fixture
def phantoms():
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(30, 34, 31)), validation_fraction=0.0)
    return VolumeDataset(load_cases(config), config)


def test_a_known_error_gives_its_psnr(phantoms):
    """0.02 in [-1, 1] is 0.01 in [0, 1]: 40 dB, whatever happens in the padding; brightness leaves the spectrum alone."""
    for prepared in phantoms.prepared:
        np.clip(prepared.image.array, -0.9, 0.9, out=prepared.image.array)  # so that nothing is clamped
    seen = []
    result = evaluate_reconstruction(
        ShiftedCoder(0.02), phantoms, on_volume=lambda name, value: seen.append((name, value))
    )
    assert result["volumes"] == 3
    assert result["psnr_db"]["mean"] == pytest.approx(40, abs=1e-3)
    assert dict(seen) == result["psnr_db"]["per_volume"]
    assert list(result["spectrum"]["ratio_db"].values()) == pytest.approx([0] * 10, abs=1e-4)


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
    assert 0 < report["psnr_db"]["mean"] < 30  # untrained
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
