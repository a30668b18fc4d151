"""Windows look at the voxels: sets that nothing is left of are refused by name, and the doctor says what is lost,
once."""

import re
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import yaml
from tiny import editor_of, tiny_pipeline

from autoencoder import AutoencoderKL3D
from evaluation.doctor import models as doctor_config
from evaluation.doctor.__main__ import main
from evaluation.doctor.models import config_from_sections, with_precision
from evaluation.doctor.start import advise_start
from training import TrainVaeConfig
from volumes import DataConfig, IntensityScaling, Volume, VolumeDataset, VolumeError, load_cases

SHAPE = (12, 14, 10)
CT = {"kind": "window", "low": -160, "high": 240}
VAE = {"class": "autoencoder.AutoencoderKL3D", "channels": [8, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}


def save(path, values):
    path.parent.mkdir(exist_ok=True)
    image = nib.Nifti1Image(np.asarray(values, np.float32), np.eye(4))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def hounsfield(seed):
    """Soft tissue and air, in HU."""
    draw = np.random.default_rng(seed)
    return np.where(draw.random(SHAPE) < 0.4, -1000, draw.normal(40, 60, SHAPE))


def pet(seed):
    """SUV around 2, of whose voxels 1 in 500 is a lesion up to 27."""
    draw = np.random.default_rng(seed)
    values = draw.gamma(4.0, 0.5, SHAPE)
    values.flat[draw.choice(values.size, values.size // 500 + 1, replace=False)] = 27.0
    return values


def dataset(folder, **settings):
    config = DataConfig(root=str(folder), images="images/{case}.nii.gz", validation_fraction=0.0, **settings)
    return VolumeDataset(load_cases(config), config)


def examined(folder, capsys, data=None, **sections):
    """Exit status, and the findings as (level, check, message)."""
    whole = {"data": {"root": str(folder), "images": "images/{case}.nii.gz", **(data or {})}, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    status = main(["--config", str(folder / "config.yaml")])
    lines = re.findall(r"^(OK|WARN|FAIL) +(\S[^:]*): (.*)$", capsys.readouterr().out, re.MULTILINE)
    return status, lines


@pytest.mark.parametrize(
    ("values", "side"),
    [
        (
            np.linspace(1000, 4000, 1680).reshape(SHAPE),
            "at or above it (1000 to 4000)",
        ),  # HU + 1024, as unsigned scanners write
        (np.linspace(-3000, -160, 1680).reshape(SHAPE), "at or below it (-3000 to -160)"),
    ],
)
def test_a_volume_on_one_side_of_the_window_is_refused_by_name(tmp_path, values, side):
    save(tmp_path / "images" / "a.nii.gz", hounsfield(0))
    save(tmp_path / "images" / "b.nii.gz", values)
    said = f"b.nii.gz: 0 % of its voxels lie within the window -160 to 240: all are {side}; check the file's unit"
    with pytest.raises(VolumeError, match=re.escape(said)):
        dataset(tmp_path, intensity=IntensityScaling(**CT))
    skipped = dataset(tmp_path, intensity=IntensityScaling(**CT), on_error="skip")
    assert [case.name for case in skipped.cases] == ["a"] and "lie within the window" in skipped.skipped[0][1]


@pytest.mark.parametrize("intensity", [IntensityScaling(**CT), IntensityScaling()])
def test_a_constant_channel_is_refused_by_its_file(tmp_path, intensity):
    save(tmp_path / "images" / "a.nii.gz", hounsfield(0))
    save(tmp_path / "pet" / "a.nii.gz", np.full(SHAPE, 7))
    config = DataConfig(
        root=str(tmp_path),
        images={"ct": "images/{case}.nii.gz", "pet": "pet/{case}.nii.gz"},
        intensity={"ct": IntensityScaling(**CT), "pet": intensity},
        validation_fraction=0.0,
    )
    with pytest.raises(VolumeError, match=r"pet/a.nii.gz: channel pet: every voxel is 7: it is constant"):
        VolumeDataset(load_cases(config), config)


def test_a_label_that_a_map_lacks_is_no_constant_channel(tmp_path):
    save(tmp_path / "images" / "a.nii.gz", np.indices(SHAPE)[0] % 2)
    names = {0: "background", 1: "organ", 2: "lesion"}
    assert (dataset(tmp_path, image_labels=names)[0]["image"][1] == -1).all()


def test_few_voxels_within_the_window_are_a_warning(tmp_path, caplog):
    few = np.full(SHAPE, -1000.0)
    few.flat[:50] = np.linspace(-100, 200, 50)  # 50 of 1680
    save(tmp_path / "images" / "a.nii.gz", hounsfield(0))
    save(tmp_path / "images" / "b.nii.gz", few)
    save(tmp_path / "images" / "c.nii.gz", np.where(few > -1000, 100, -1000))  # two values: a window hides none of them
    with caplog.at_level("WARNING"):
        dataset(tmp_path, intensity=IntensityScaling(**CT))
    (line,) = [one.message for one in caplog.records if "window" in one.message]
    assert "cuts off most of 1 of 3 volumes" in line and "b.nii.gz (3.0%)" in line


def test_a_window_that_makes_two_values_of_many_is_a_warning(tmp_path, caplog):
    """All voxels lie outside of it, on both sides."""
    save(tmp_path / "images" / "a.nii.gz", np.random.default_rng(0).normal(size=SHAPE))
    with caplog.at_level("WARNING"):
        dataset(tmp_path, intensity=IntensityScaling("window", 1e-9, 2e-9))
    assert "cuts off most of 1 of 1 volumes" in caplog.text and "a.nii.gz (0.0%)" in caplog.text


def test_an_image_that_is_given_out_of_its_window_is_refused():
    pipe = tiny_pipeline(num_labels=0, labels={}, intensity=[CT])
    values = np.linspace(1000, 4000, 1728, dtype=np.float32).reshape(1, 12, 12, 12)
    with pytest.raises(ValueError, match="the image 'MR': 0 % of its voxels lie within the window -160 to 240"):
        editor_of(pipe)(image=Volume(values, np.eye(4)), strength=0.5, num_inference_steps=2)


def test_the_doctor_says_each_thing_once(tmp_path, capsys):
    """Of no check and channel it says OK beside WARN or FAIL, whatever is wrong with the files."""
    for seed in range(4):
        save(tmp_path / "images" / f"{seed}.nii.gz", hounsfield(seed))
    save(tmp_path / "images" / "constant.nii.gz", np.full(SHAPE, 7))
    save(tmp_path / "images" / "stored.nii.gz", np.linspace(1000, 4000, 1680).reshape(SHAPE))
    (tmp_path / "images" / "torn.nii.gz").write_bytes((tmp_path / "images" / "0.nii.gz").read_bytes()[:-200])
    status, lines = examined(tmp_path, capsys, {"intensity": CT})
    assert status == 1
    failed = [message for level, check, message in lines if (level, check) == ("FAIL", "files")]
    assert len(failed) == 3
    for name, reason in (("constant", "constant"), ("stored", "lie within the window"), ("torn", "gzip")):
        assert any(name in message and reason in message for message in failed)
    assert next((level, check) for level, check, message in lines if "4 of 7 volumes" in message) == ("WARN", "cases")
    levels = {check: {level for level, one, _ in lines if one == check} for _, check, _ in lines}
    assert not [check for check in ("cases", "files", "intensity") if "OK" in levels[check] and len(levels[check]) > 1]
    assert Counter(check for _, check, _ in lines)["intensity"] == 1


def test_the_doctor_names_what_percentiles_take_from_pet(tmp_path, capsys):
    for seed in range(3):
        save(tmp_path / "images" / f"{seed}.nii.gz", pet(seed))
    high = np.median([np.percentile(pet(seed), 99.5) for seed in range(3)])
    _, lines = examined(tmp_path, capsys)
    ((level, message),) = [(level, message) for level, check, message in lines if check == "intensity"]
    assert level == "WARN" and f"maxima of 27 become {high:.3g}" in message
    _, lines = examined(tmp_path, capsys, {"intensity": {"kind": "window", "low": 0, "high": 30}})
    assert [level for level, check, _ in lines if check == "intensity"] == ["OK"]
    _, lines = examined(tmp_path, capsys, {"intensity": {"kind": "window", "low": 0, "high": 10}})
    ((level, message),) = [(level, message) for level, check, message in lines if check == "intensity"]
    assert "values up to 27 become 10" in message


def test_the_doctor_refuses_settings_that_training_refuses(tmp_path, capsys):
    save(tmp_path / "images" / "a.nii.gz", hounsfield(0))
    save(tmp_path / "images" / "b.nii.gz", hounsfield(1))
    status, lines = examined(tmp_path, capsys, model=VAE, loop={"batch_size": 0, "ema_decay": 2}, losses={"kl": -1})
    assert status == 1
    said = [message for level, check, message in lines if (level, check) == ("FAIL", "config")]
    assert [one.partition(":")[0] for one in said] == ["losses.kl", "loop.batch_size", "loop.ema_decay"]


def test_the_precision_is_the_trainers(monkeypatch):
    config = config_from_sections({"model": VAE}, DataConfig(images="x"))
    assert isinstance(config, TrainVaeConfig)
    assert config.loop.batch_size == 4 and config.crops.shape == (32, 32, 32)  # the trainer's defaults

    def planned(loop=None, precision=None, accelerator=False):
        config = config_from_sections({"model": VAE, "loop": loop or {}}, DataConfig(images="x"))
        return with_precision(config, precision, accelerator).loop.mixed_precision

    for native, precision in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr("training.engine.precision.native_bf16", lambda native=native: native)
        assert planned() == precision
        assert planned({"mixed_precision": "auto"}) == precision
    assert planned(accelerator=True) == "bf16"
    assert planned({"mixed_precision": "no"}, accelerator=True) == "no"
    assert planned(precision="fp16") == "fp16"
    assert doctor_config.GENERATION_BATCH == 8


def test_advice_to_start_from_weights_is_given_where_they_fit():
    one = DataConfig(images="x")
    two = DataConfig(images={"t1": "x", "t2": "y"})
    shipped = {"channels": (32, 128), "encoder_blocks": (1, 1), "decoder_blocks": (1, 3)}

    def advice(config, spacing=(1.0, 1.0, 1.1), **options):
        channels = len(config.channels)
        vae = AutoencoderKL3D(
            **{"in_channels": channels, "out_channels": channels, "latent_channels": 6, **shipped, **options}
        )
        return advise_start(vae, config, [spacing])

    assert "--init_from shipped:hippocampus/vae" in str(advice(one))
    assert advice(one, latent_channels=4) is None  # the last layers would stay fresh
    assert advice(one, spacing=(1.0, 1.0, 5.0)) is None
    assert advice(DataConfig(images="x", intensity=IntensityScaling(**CT))) is None  # HU are not intensities of MR
    mixed = advice(two)
    assert mixed is not None and mixed.startswith("no shipped weights fit an autoencoder that mixes 2 channels")
    assert "per_channel: true, latent_channels: 12, channels: [32, 128]" in mixed
    apart = advice(two, per_channel=True, latent_channels=12)
    assert apart is not None and "each channel separately, per_channel): --init_from shipped:hippocampus/vae" in apart
    maps = DataConfig(images="x", image_labels={0: "background", 1: "gland"})
    assert advice(maps) is None
    gland = AutoencoderKL3D(channels=(32, 96), decoder_blocks=(1, 2), patch_size=4)
    assert "--init_from shipped:adrenal-shapes/vae" in str(advise_start(gland, maps, [(1.0, 1.0, 1.0)]))
