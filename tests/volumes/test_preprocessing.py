"""An autoencoder says how its volumes were prepared; others than those it does not take without a word."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.state import AcceleratorState
from tiny import tiny_data, tiny_pipeline
from trained_models import AUTOENCODERS, WINDOW, train, write_data

import evaluate
import train_ldm
import train_vae
from autoencoder import VolumeAutoencoder
from evaluation.doctor import __main__ as doctor
from evaluation.report import read_config
from pipelines import MedVolumePipeline
from pipelines.lora import add_lora, save_lora
from pipelines.storage.loading import load_autoencoder
from training import TrainLdmConfig, TrainVaeConfig, parse_config
from training.ldm import check_prepared
from volumes import DataConfig, IntensityScaling
from volumes.data.preprocessing import (
    check_preprocessing,
    common_spacing,
    described_preprocessing,
    differences,
    inherited,
    preprocessing,
)
from volumes.description import ChannelScale

CT = {"kind": "window", "low": -1000.0, "high": 1000.0}


def facts(**changes):
    config = DataConfig(images="*.nii.gz", intensity=IntensityScaling(**CT))
    return preprocessing(replace(config, **changes), [(1, 1, 2.0), (1.004, 1, 2), (1, 1, 2)])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def vae(data, tmp_path_factory) -> Path:
    return train(train_vae, data, tmp_path_factory.mktemp("vae") / "run")


# Facts


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        (
            {"intensity": IntensityScaling("window", -100, 300)},
            "it learned window -1000 to 1000, the data has window -100 to 300",
        ),
        ({"intensity": IntensityScaling()}, "intensity of image: .*the data has percentile 0.5 to 99.5"),
        ({"spacing": (1, 1, 2)}, None),
        ({"spacing": (2, 2, 2)}, "it learned 1 x 1 x 2 mm, the data has 2 x 2 x 2 mm .data.spacing: .1.0, 1.0, 2.0."),
        ({"images": {"a": "a*", "b": "b*"}}, r"channels: it learned \['image'\], the data has \['a', 'b'\]"),
        ({"images": {"t1": "a*"}}, None),  # one channel may be called otherwise
        ({"time_point": 1}, None),  # of 4-D files, where the others were 3-D
    ],
)
def test_what_differs_is_said_on_both_sides(changes, expected):
    found = differences(facts(), facts(**changes))
    assert (found == []) is (expected is None) and (expected is None or re.search(expected, found[0]))


def test_channels_have_an_order_and_each_its_scaling():
    two = {"ct": IntensityScaling(**CT), "pet": IntensityScaling("window", 0, 20)}
    learned = facts(images={"ct": "ct*", "pet": "pet*"}, intensity=two)
    assert differences(learned, facts(images={"ct": "a*", "pet": "b*"}, intensity=dict(reversed(two.items())))) == []
    found = differences(learned, facts(images={"pet": "pet*", "ct": "ct*"}, intensity=two))
    assert found[0] == "channels: it learned ['ct', 'pet'], the data has ['pet', 'ct']"


def test_label_maps_are_compared_by_what_becomes_of_each_value():
    def of(labels, label_map=None):
        return facts(image_labels=labels, label_map=label_map or {}, intensity=IntensityScaling())

    names = {0: "background", 1: "anterior", 2: "posterior"}
    learned = of(names, {4: 1})
    assert (
        differences(learned, of(names)) == [] and differences(learned, of(names, {3: 2})) == []
    )  # other files, other values
    assert "label_map" in differences(of(names), of(names, {2: 1}))[0]
    assert "label_map" in differences(learned, of(names, {4: 2}))[0]
    swapped = of({0: "background", 1: "posterior", 2: "anterior"})
    assert [text.split(":")[0] for text in differences(learned, swapped)] == ["channels", "image_labels"]
    assert "image_labels" in differences(learned, {**learned, "image_labels": {}})[0]
    assert differences(of({0: "b", 1: "c", 2: "d"}), of({0: "b", 5: "c", 7: "d"})) == []  # the same channels
    assert differences(of({0: "b", 1: "c", 2: "d"}), of({0: "b", 5: "c", 10: "d"})) == []  # 10 comes after 5


def test_a_common_spacing_is_the_middle_one_if_all_are_near_it():
    assert common_spacing([(1.008, 1, 2), (1, 1, 2.01), (1, 1.002, 2)]) == (1, 1, 2)
    assert common_spacing([(1.02, 1, 2), (1, 1, 2), (1, 1, 2)]) is None


def test_volumes_of_one_spacing_are_not_those_of_several():
    several = preprocessing(DataConfig(images="x", intensity=IntensityScaling(**CT)), [(1, 1, 2), (1, 1, 3)])
    assert several["spacing"] is None
    assert "voxels of several sizes" in differences(facts(), several)[0] and differences(several, facts()) == []


def test_time_points_differ():
    found = differences(facts(time_point=0), facts(time_point=2))
    assert found == ["time_point of image: it learned [0], the data has [2]"]


def test_a_scale_by_percentiles_names_them():
    entry = tiny_data().intensity[0].to_json()
    del entry["percentiles"]
    with pytest.raises(ValueError, match="percentiles, by which it is scaled"):
        ChannelScale.from_json(entry)


def test_a_description_is_compared_by_its_percentiles():
    described = described_preprocessing(tiny_data())  # percentiles 0.5 and 99.5
    assert differences(described, facts(intensity=IntensityScaling(), spacing=(1, 1, 1))) == []
    [found] = differences(described, facts(intensity=IntensityScaling("percentile", 5, 95), spacing=(1, 1, 1)))
    assert "percentile 0.5 to 99.5" in found and "percentile 5 to 95" in found
    assert "window" in differences(described, facts(spacing=(1, 1, 1)))[0]


@pytest.mark.parametrize(
    "damaged", ["x", {}, {"channels": ["a"]}, {"channels": ["a"], "intensity": [{"kind": "x", "low": 0, "high": 1}]}]
)
def test_damaged_facts_are_refused(damaged):
    with pytest.raises(ValueError, match="not a description of preprocessing"):
        check_preprocessing(damaged)


# Training


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_every_autoencoder_stores_what_its_volumes_were(kind, data, tmp_path):
    model = f"--model={AUTOENCODERS[kind]}"
    folder = train(
        train_vae, data, tmp_path / kind, model, "--data.spacing=[1, 1, 1]", "--data.validation_fraction=0.2"
    )
    stored = load_autoencoder(folder)
    assert stored.config["data"]["intensity"] == [WINDOW] and stored.config["data"]["spacing"] == [1, 1, 1]
    assert stored.config["data"]["resampled"] is True and len(stored.config["subjects"]) == 1
    other = json.loads(json.dumps(dict(stored.config)["data"])) | {"intensity": [CT]}
    with pytest.raises(ValueError, match="window 0 to 1100, the data has window -1000 to 1000"):
        check_prepared(SimpleNamespace(vae="x"), stored, other)  # pyright: ignore[reportArgumentType]


def test_another_window_than_the_autoencoder_s_is_refused(data, vae, tmp_path):
    window = "--data.intensity={kind: window, low: 0, high: 500}"
    with pytest.raises(ValueError, match=r"vae .*(?s:.*)it learned window 0 to 1100, the data has window 0 to 500"):
        train(train_ldm, data, tmp_path / "p", f"--vae={vae}", window)
    with pytest.raises(ValueError, match=r"spacing: it learned 1 x 1 x 1 mm, the data has 2 x 2 x 2 mm"):
        train(train_ldm, data, tmp_path / "p", f"--vae={vae}", "--data.spacing=[2, 2, 2]")
    assert not (tmp_path / "p/checkpoints").exists()


def test_what_a_config_leaves_out_is_the_autoencoder_s(data, vae, tmp_path, capsys):
    section = yaml.safe_load(data.read_text())["data"]
    del section["intensity"]
    path = tmp_path / "ldm.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "p"), "vae": str(vae), "model": {}, "data": section}))
    config = parse_config(TrainLdmConfig, ["--config", str(path)])
    assert config.data.intensity == IntensityScaling(**WINDOW) and config.data.spacing is None
    with pytest.raises(SystemExit):
        parse_config(TrainLdmConfig, ["--config", str(path), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["intensity"] == WINDOW
    assert read_config(path)["data"]["intensity"] == WINDOW  # evaluate.py and doctor read it so
    train(train_ldm, path, tmp_path / "p", f"--vae={vae}")
    saved = yaml.safe_load((tmp_path / "p/config.yaml").read_text())
    assert saved["data"]["intensity"] == WINDOW
    explicit = parse_config(
        TrainLdmConfig, ["--config", str(path), "--data.intensity={kind: percentile, low: 0.5, high: 99.5}"]
    )
    assert explicit.data.intensity == IntensityScaling()  # and is then refused, for it was said


def test_spacing_is_inherited_where_volumes_were_resampled(tmp_path):
    stored = {**facts(spacing=(1.5, 1.5, 2)), "channels": ["a", "b"], "intensity": [CT, WINDOW]}
    (tmp_path / "config.json").write_text(json.dumps({"data": stored}))
    own = {"images": {"a": "x", "b": "y"}}
    assert inherited(tmp_path, own) == {"intensity": {"a": CT, "b": WINDOW}, "spacing": [1.5, 1.5, 2]}
    assert inherited(tmp_path, {**own, "spacing": None}) == {"intensity": {"a": CT, "b": WINDOW}}
    assert inherited(tmp_path, {"images": {"b": "y", "a": "x"}}) == {"spacing": [1.5, 1.5, 2]}  # refused by its order
    assert inherited(tmp_path, {"images": "x"}) == {} and inherited(tmp_path / "none", own) == {}


def test_fine_tuning_keeps_a_frozen_encoder_s_window(data, vae, tmp_path, caplog):
    more = [f"--init_from={vae}", "--data.intensity={kind: window, low: 0, high: 500}"]
    with pytest.raises(ValueError, match="window 0 to 1100, the data has window 0 to 500"):
        train(train_vae, data, tmp_path / "a", *more, "--freeze_encoder=true")
    with caplog.at_level(logging.WARNING):
        folder = train(train_vae, data, tmp_path / "b", *more)
    assert "was trained on volumes prepared otherwise: intensity" in caplog.text
    assert load_autoencoder(folder).config["data"]["intensity"] == [{"kind": "window", "low": 0, "high": 500}]
    section = yaml.safe_load(data.read_text())["data"]
    del section["intensity"]
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump({"output": "x", "model": {}, "data": section}))
    config = parse_config(TrainVaeConfig, ["--config", str(tmp_path / "vae.yaml"), f"--init_from={vae}"])
    assert config.data.intensity == IntensityScaling(**WINDOW)


def test_an_autoencoder_without_a_record_has_a_warning(data, vae, tmp_path, caplog):
    shutil.copytree(vae, tmp_path / "bare")
    config = json.loads((vae / "config.json").read_text())
    (tmp_path / "bare/config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("data", "subjects")})
    )
    with caplog.at_level(logging.WARNING):
        train(train_ldm, data, tmp_path / "p", f"--vae={tmp_path / 'bare'}")
    assert "bare: does not record how its volumes were prepared" in caplog.text
    assert "bare: its record of training subjects is not complete" in caplog.text


# Elsewhere


def test_evaluation_and_doctor_refuse_another_window(data, vae, tmp_path, capsys):
    other = ["--data.intensity", "{kind: window, low: 0, high: 500}"]
    arguments = ["reconstruction", "--config", str(data), "--vae", str(vae), "--output", str(tmp_path / "r.json")]
    with pytest.raises(ValueError, match=r"(?s)vae: learned from.*window 0 to 1100, the data has window 0 to 500"):
        evaluate.main([*arguments, *other])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert doctor.main(["--config", str(data), "--pipeline", str(vae), *other]) == 1
    assert (
        "FAIL" in (said := capsys.readouterr().out)
        and "it learned window 0 to 1100, the data has window 0 to 500" in said
    )
    section = yaml.safe_load(data.read_text())["data"]
    ldm = {"output": "x", "vae": str(vae), "model": {"class": "diffusion.LatentUNet3D"}, "data": section}
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump(ldm))
    assert doctor.main(["--config", str(tmp_path / "ldm.yaml"), *other]) == 1
    assert "window 0 to 1100, the data has window 0 to 500" in capsys.readouterr().out
    doctor.main(["--config", str(tmp_path / "ldm.yaml")])
    assert "was trained on volumes prepared like these" in capsys.readouterr().out


def learned(vae: VolumeAutoencoder, **changes) -> VolumeAutoencoder:
    own = described_preprocessing(tiny_data()) | {"intensity": [CT]} | changes
    vae.register_to_config(data=own)
    return vae


def test_a_pipeline_is_of_one_preprocessing(tmp_path):
    pipe = tiny_pipeline(intensity=[CT])
    MedVolumePipeline(learned(pipe.vae), pipe.unet, pipe.scheduler, data=pipe.data)
    for changes, said in (
        ({"intensity": [WINDOW]}, "intensity of MR: it learned window 0 to 1100, the data has window -1000 to 1000"),
        ({"spacing": [2.0, 2.0, 2.0]}, "spacing: it learned 2 x 2 x 2 mm, the data has 1 x 1 x 1 mm"),
        ({"image_labels": {"0": "background", "1": "MR"}}, "image_labels"),
    ):
        with pytest.raises(ValueError, match=said):
            MedVolumePipeline(learned(pipe.vae, **changes), pipe.unet, pipe.scheduler, data=pipe.data)
    learned(pipe.vae)
    pipe.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    index["data"]["intensity"] = [WINDOW]
    (tmp_path / "p/model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="window -1000 to 1000, the data has window 0 to 1100"):
        MedVolumePipeline.from_pretrained(tmp_path / "p")


def test_a_lora_of_another_window_is_refused(tmp_path):
    pytest.importorskip("peft")
    pipe = tiny_pipeline(intensity=[CT])
    base = pipe.unet_hash
    add_lora(pipe.unet, rank=2, alpha=2, target_modules=["qkv"])
    for name, intensity in (("same", [CT]), ("other", [WINDOW])):
        own = described_preprocessing(pipe.data) | {"intensity": intensity}
        save_lora(pipe.unet, tmp_path / name, base, trained_on={"data": own, "subjects": None})
    fresh = tiny_pipeline(intensity=[CT])
    with pytest.raises(ValueError, match="window 0 to 1100, the data has window -1000 to 1000"):
        fresh.load_lora_weights(tmp_path / "other")
    assert not getattr(fresh.unet, "peft_config", {})
    fresh.load_lora_weights(tmp_path / "same")
