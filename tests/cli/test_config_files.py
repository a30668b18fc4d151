"""Paths of config files, sections in files of their own, and what a run saves of both."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import evaluate
import generate
from autoencoder import AutoencoderKL3D
from autoencoder.weights import find_folder
from cli.config_files import from_folder, paths_changed, resolved, section_words, written_in
from cli.settings import names_below
from evaluation.doctor.models import config_class_of
from evaluation.report import read_config
from files.documents import FileError, dump_settings, load_settings
from files.shipped import shipped_folder
from pipelines.storage.loading import find_autoencoder
from pipelines.storage.to_dicom import label_names
from pipelines.storage.trained_on import read_model
from training import TrainLdmConfig, TrainVaeConfig, config_changes, parse_config, save_config
from training.engine.config import flatten, to_plain
from training.engine.config import read_config as read_saved

ROOT = Path(__file__).resolve().parents[2]
VAE = "model: {class: autoencoder.AutoencoderKL3D}\n"
LDM = "model: {class: diffusion.LatentUNet3D}\n"
DATA = "root: ../scans\ntable: t.csv\nimages: '{name}.nii'\nmasks: seg/{name}.nii\nlabel_names: {0: background, 1: a}\n"


def project(folder: Path) -> Path:
    """A recipe in `folder`/recipe: data.yaml, vae.yaml, ldm.yaml."""
    recipe = folder / "recipe"
    recipe.mkdir(parents=True)
    (recipe / "data.yaml").write_text(DATA)
    (recipe / "vae.yaml").write_text(f"output: vae\ndata: data.yaml\nperceptual: {{network: ../nets/vgg}}\n{VAE}")
    more = "resume: latest\ncache: {folder: ../latents}\n"
    (recipe / "ldm.yaml").write_text(f"output: ldm\nvae: vae/vae\ninit_from: ~/unet\ndata: data.yaml\n{more}{LDM}")
    return recipe


def paths(config: Any) -> dict[str, str]:
    """All `UserPath`s of a config by value, in the order of the settings."""
    found: dict[str, str] = {}
    paths_changed(type(config), to_plain(config), lambda path: found.setdefault(path, path))
    return found


@pytest.mark.parametrize("start", [".", "recipe", "recipe/vae", "elsewhere"])
def test_paths_start_at_the_folder_of_their_file(start, tmp_path, monkeypatch):
    recipe, home = project(tmp_path), tmp_path / start
    home.mkdir(exist_ok=True)
    monkeypatch.chdir(home)
    for given in (recipe, Path(os.path.relpath(recipe))):
        vae = parse_config(TrainVaeConfig, ["--config", str(given / "vae.yaml")])
        ldm = parse_config(TrainLdmConfig, ["--config", str(given / "ldm.yaml")])
        assert vae.perceptual is not None and ldm.init_from == str(Path.home() / "unet")
        expected = {
            vae.output: recipe / "vae",
            vae.data.root: tmp_path / "scans",
            vae.perceptual.network: tmp_path / "nets/vgg",
            ldm.output: recipe / "ldm",
            ldm.vae: recipe / "vae/vae",
            ldm.cache.folder: tmp_path / "latents",
            ldm.data.root: tmp_path / "scans",
        }
        for path, place in expected.items():
            assert not os.path.isabs(str(path)) and Path(str(path)).resolve() == place, path
        # relative to root, or no paths
        assert (vae.data.table, vae.data.images, vae.data.masks) == ("t.csv", "{name}.nii", "seg/{name}.nii")
        assert ldm.resume == "latest"


def test_options_start_at_the_working_directory(tmp_path, monkeypatch):
    recipe = project(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["--config", "recipe/ldm.yaml", "--output", "out", "--data.root=here", "--cache.folder", "s3://b/latents"]
    ldm = parse_config(TrainLdmConfig, [*words, "--data.images=a/{x}.nii", "--vae", "../v"])
    assert (ldm.output, ldm.data.root, ldm.cache.folder, ldm.vae) == ("out", "here", "s3://b/latents", "../v")
    assert ldm.data.images == "a/{x}.nii" and ldm.data.table == "t.csv"
    assert parse_config(TrainLdmConfig, ["--config", str(recipe / "ldm.yaml")]).output == "recipe/ldm"  # no machine's


def test_a_section_without_root_means_the_folder_of_its_file(tmp_path, monkeypatch):
    recipe = project(tmp_path)
    monkeypatch.chdir(tmp_path)
    (recipe / "data.yaml").write_text("images: '{name}.nii'\n")
    assert parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml"]).data.root == "recipe"
    assert read_config(recipe / "vae.yaml")["data"]["root"] == "recipe"
    common = ["--output=o", "--model={class: autoencoder.AutoencoderKL3D}"]
    assert parse_config(TrainVaeConfig, [*common, "--data.images=x"]).data.root == "."
    (tmp_path / "more.yaml").write_text("data: {split_seed: 3}\n")  # says nothing of the files
    both = parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml", "--config", "more.yaml"])
    assert both.data.root == "recipe" and both.data.split_seed == 3


def test_absolute_paths_home_and_urls_stay(tmp_path):
    for path in ("/a/b", "~/b", "s3://bucket/x", "file:///x", "memory://m"):
        assert from_folder(path, tmp_path) == written_in(path, tmp_path) == path
    assert from_folder("~x.nii", "a") == "a/~x.nii"  # no home folder of a user
    assert written_in(from_folder("../c", "a/b"), "a/b") == "../c" and from_folder("../c", "a/b") == "a/c"


def test_a_section_in_the_home_folder(tmp_path, monkeypatch):
    """Its own paths start there too."""
    recipe = project(tmp_path / "home/project")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # of Windows
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae.yaml").write_text(f"output: vae\ndata: ~/project/recipe/data.yaml\n{VAE}")
    config = parse_config(TrainVaeConfig, ["--config", "vae.yaml"])
    assert Path(config.data.root).resolve() == (recipe.parent / "scans").resolve()


def test_every_program_reads_a_config_in_the_same_way(tmp_path, monkeypatch):
    """The configs of the project, from another directory: training, evaluate.py and doctor find the same paths."""
    monkeypatch.chdir(tmp_path)
    for path in sorted(ROOT.glob("configs/*/*.yaml")):
        if path.parent.name == "accelerate" or path.stem == "data":
            continue
        sections = read_config(path)
        config = parse_config(config_class_of(sections), ["--config", str(path)])
        assert Path(config.output).resolve().is_relative_to(ROOT / "output"), path
        own = flatten(to_plain(config))
        for name in ("output", "vae", "init_from"):
            assert sections.get(name) == own.get(name), path
        values = evaluate.parse(["dice", "--config", str(path), "--output", "o", "--synthetic", "s"])
        assert values.dice.data == config.data
        if config.data.phantom is None:
            assert Path(config.data.root).resolve().parent == ROOT / "data"


@pytest.mark.parametrize("given", ["relative", "absolute"])
def test_a_saved_config_moves_with_its_project(given, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second/deeper"
    project(first)
    monkeypatch.chdir(first)
    output = "recipe/ldm" if given == "relative" else str(first / "recipe/ldm")
    config = parse_config(TrainLdmConfig, ["--config", "recipe/ldm.yaml", f"--output={output}"])
    (first / "recipe/ldm").mkdir()
    save_config(config, Path(output) / "config.yaml")
    saved = yaml.safe_load((first / "recipe/ldm/config.yaml").read_text())
    assert (saved["output"], saved["vae"], saved["data"]["root"]) == (".", "../vae/vae", "../../scans")
    assert saved["data"]["table"] == "t.csv" and saved["cache"]["folder"] == "../../latents"
    for home in (first, first / "recipe", tmp_path):  # the same run, from anywhere
        monkeypatch.chdir(home)
        again = parse_config(TrainLdmConfig, ["--config", str(first / "recipe/ldm/config.yaml")])
        assert config_changes(read_saved(first / "recipe/ldm/config.yaml", TrainLdmConfig), again) == {}
        assert Path(again.output).resolve() == first / "recipe/ldm"
    monkeypatch.chdir(tmp_path)
    second.parent.mkdir()
    shutil.move(first, second)
    moved = parse_config(TrainLdmConfig, ["--config", str(second / "recipe/ldm.yaml")])
    assert config_changes(read_saved(second / "recipe/ldm/config.yaml", TrainLdmConfig), moved) == {}
    other = parse_config(TrainLdmConfig, ["--config", str(second / "recipe/ldm.yaml"), "--data.root=scans"])
    changes = config_changes(read_saved(second / "recipe/ldm/config.yaml", TrainLdmConfig), other)
    assert changes == {"data.root": "second/deeper/scans -> scans"}


def test_the_printed_config_means_the_same(tmp_path, monkeypatch, capsys):
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["--config", "recipe/ldm.yaml", "--loop.max_steps=7"]
    with pytest.raises(SystemExit):
        parse_config(TrainLdmConfig, [*words, "--print_config"])
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    assert parse_config(TrainLdmConfig, ["--config", "all.yaml"]) == parse_config(TrainLdmConfig, words)


# One data section


def test_a_section_may_be_in_its_own_file_or_inline(tmp_path, monkeypatch):
    recipe = project(tmp_path)
    monkeypatch.chdir(tmp_path)
    apart = parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml"])
    sections = yaml.safe_load((recipe / "vae.yaml").read_text()) | {"data": yaml.safe_load(DATA)}
    (recipe / "inline.yaml").write_text(yaml.safe_dump(sections))
    assert parse_config(TrainVaeConfig, ["--config", "recipe/inline.yaml"]) == apart
    words = ["--output=recipe/vae", "--perceptual={network: nets/vgg}", "--model={class: autoencoder.AutoencoderKL3D}"]
    assert parse_config(TrainVaeConfig, [*words, "--data", "recipe/data.yaml"]) == apart
    assert parse_config(TrainVaeConfig, [*words, "--data=recipe/data.yaml", "--data.root=scans"]) == apart
    assert parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml", "--data.split_seed=4"]).data.split_seed == 4
    common = ["dice", "--config", "recipe/vae.yaml", "--output", "o", "--synthetic", "s"]
    assert evaluate.parse(common).dice.data == evaluate.parse([*common, "--data=recipe/data.yaml"]).dice.data
    assert evaluate.parse(common).dice.data == apart.data


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "images: x\ntest_fraction: 1.5\n",
            "data.yaml: test_fraction: got 1.5, expected a number, 0 or more and below",
        ),
        ("images: x\nimage: y\n", "data.yaml: image: is not a setting; did you mean images?"),
        ("images: x\ndata: {root: y}\n", "data.yaml: data: is not a setting"),
        ("images: x\nsplit: s\ntest_fraction: 0.2\n", "data.yaml: data: test_fraction has no effect when split names"),
        ("images: x\nintensity: {low: 5, high: 1}\n", "data.yaml: data.intensity: intensity low"),
        ("- a\n", "vae.yaml: data: data.yaml: holds list, not settings by name"),
        ("", "vae.yaml: data: data.yaml: is empty"),
        ("a: [\n", "data.yaml: is not readable YAML"),
        (None, "vae.yaml: data: data.yaml: no such file"),
    ],
)
def test_errors_name_the_file_of_the_section(text, said, tmp_path, monkeypatch):
    recipe = project(tmp_path)
    monkeypatch.chdir(tmp_path)
    (recipe / "data.yaml").unlink() if text is None else (recipe / "data.yaml").write_text(text)
    with pytest.raises(ValueError) as refused:
        parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml"])
    assert str(refused.value).startswith("recipe/") and said in str(refused.value)


def test_an_error_of_the_config_does_not_blame_the_section(tmp_path, monkeypatch):
    recipe = project(tmp_path)
    monkeypatch.chdir(tmp_path)
    (recipe / "vae.yaml").write_text(f"output: vae\ndata: data.yaml\nloop: {{max_steps: 0}}\n{VAE}")
    with pytest.raises(ValueError, match=r"^recipe/vae.yaml: loop.max_steps: got 0"):
        parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml"])
    (recipe / "vae.yaml").write_text(f"output: vae\ndata: data.yaml\n{VAE}")
    with pytest.raises(ValueError, match=r"^data.test_fraction: got 7"):
        parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml", "--data.test_fraction=7"])
    with pytest.raises(ValueError, match=r"^data: test_fraction has no effect when split"):
        parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml", "--data.test_fraction=0.1", "--data.split=s"])


def test_without_data_the_run_of_the_autoencoder_has_it(tmp_path, monkeypatch):
    recipe = project(tmp_path)
    monkeypatch.chdir(tmp_path)
    (recipe / "ldm.yaml").write_text(f"output: ldm\nvae: vae/vae\n{LDM}")
    with pytest.raises(ValueError, match=r"data: is not set, and there is no config.yaml of a run in recipe/vae/vae"):
        parse_config(TrainLdmConfig, ["--config", "recipe/ldm.yaml"])
    vae = parse_config(TrainVaeConfig, ["--config", "recipe/vae.yaml", "--data.split_seed=9"])
    (recipe / "vae/vae").mkdir(parents=True)
    save_config(vae, recipe / "vae/config.yaml")
    for folder in ("recipe/vae/vae", "recipe/vae"):
        words = ["--config", "recipe/ldm.yaml", "--vae", folder]
        assert parse_config(TrainLdmConfig, words).data == vae.data and vae.data.split_seed == 9
    moved = parse_config(TrainLdmConfig, ["--config", "recipe/ldm.yaml", "--data.root=copy"])
    assert (moved.data.root, moved.data.split_seed) == ("copy", 9)
    own = parse_config(TrainLdmConfig, ["--config", "recipe/ldm.yaml", "--data.images=x"])  # other volumes: nothing
    assert own.data.masks is None and own.data.split_seed == 0
    assert read_config(recipe / "ldm.yaml")["data"]["split_seed"] == 9


def test_what_differs_is_refused_with_both_sides(tmp_path, monkeypatch):
    import train_ldm

    monkeypatch.chdir(tmp_path)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    scaling = {"kind": "window", "low": 0, "high": 1000}
    vae.register_to_config(data={"channels": ["image"], "intensity": [scaling]})
    vae.save_pretrained("vae")
    (tmp_path / "data.yaml").write_text("phantom: {count: 4, shape: [8, 8, 8]}\nintensity: {kind: window, high: 500}\n")
    (tmp_path / "ldm.yaml").write_text(f"output: ldm\nvae: vae\ndata: data.yaml\nloop: {{trackers: []}}\n{LDM}")
    with pytest.raises(ValueError) as refused:
        train_ldm.main(["--config", "ldm.yaml"])
    said = str(refused.value)
    assert "intensity of image: it learned window 0 to 1000, the data has window 0 to 500" in said.replace("0.5", "0")
    assert "with `data: data.yaml` both configs share one section" in said


# Words and text


def test_section_files_become_their_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/d.yaml").write_text("images: x\nroot: y\n")
    owners = {"": TrainVaeConfig}
    for words in (["--data", "sub/d.yaml"], ["--data=sub/d.yaml"]):
        (word,) = section_words(words, owners)
        assert load_settings(word.removeprefix("--data=")) == {"images": "x", "root": "sub/y"}
    same = ["--data.root", "d.yaml", "--loop={max_steps: 3}", "--output", "--data"]
    assert section_words(same, owners) == same
    with pytest.raises(ValueError, match=r"^--data none.yaml: no such file"):
        section_words(["--data", "none.yaml"], owners)
    with pytest.raises(ValueError, match=r"^sub/d.yaml: image: is not a setting"):
        (tmp_path / "sub/d.yaml").write_text("image: x\n")
        section_words(["--data", "sub/d.yaml"], owners)


@pytest.mark.parametrize("one_line", [False, True])
def test_text_that_looks_like_a_number_survives(one_line):
    values = {"a": ["1e5", "no", "010", "1:30", "0x1", "true", "null", "{case}", "a: b", "x, y", "", " z", "#", "é\n"]}
    values |= {"b": [1e-5, 1e5, 0.1, 3, True, None], "c": {0: "zero", -1: "one"}}
    text = dump_settings(values, one_line=one_line)
    assert load_settings(text) == values and yaml.safe_load(text) == values
    assert resolved("s3://x") == "s3://x" and "output" in names_below(TrainVaeConfig)


def test_names_of_shipped_weights_hold_everywhere(tmp_path, monkeypatch):
    """In a file and on the command line, from any folder; a run's own config leads to the same weights."""
    recipe = project(tmp_path)
    (recipe / "ldm.yaml").write_text(f"output: ldm\nvae: shipped:hippocampus/vae\ndata: data.yaml\n{LDM}")
    monkeypatch.chdir(tmp_path)
    config = parse_config(TrainLdmConfig, ["--config", "recipe/ldm.yaml", "--init_from", "shipped:hippocampus/unet"])
    weights = ROOT / "weights/hippocampus"
    assert (config.vae, config.init_from) == (str(weights / "vae"), str(weights / "unet"))
    assert read_config(recipe / "ldm.yaml")["vae"] == str(weights / "vae")
    Path("run").mkdir()
    save_config(config, Path("run/config.yaml"))
    assert resolved(parse_config(TrainLdmConfig, ["--config", "run/config.yaml"]).vae) == str(weights / "vae")


OTHERS = ["hippo/vae", "", "../autoencoder", "hippocampus/x", "hippocampus/results", "hippocampus/", "a\0b"]


@pytest.mark.parametrize("name", [f"shipped:{name}" for name in OTHERS])
def test_other_names_of_shipped_weights_are_refused(name):
    with pytest.raises(ValueError, match=r"no such shipped weights .*shipped:hippocampus, .*each with /vae and /unet"):
        shipped_folder(name)


def test_shipped_weights_may_be_a_link(tmp_path):
    (tmp_path / "weights").symlink_to(ROOT / "weights", target_is_directory=True)
    for name in ("hippocampus", "hippocampus/vae"):
        assert shipped_folder(f"shipped:{name}", tmp_path / "weights") == str(tmp_path / "weights" / name)


def test_every_reader_of_models_knows_shipped_names(monkeypatch, tmp_path):
    """From any folder; the config beside it is not that of a pipeline."""
    monkeypatch.chdir(tmp_path)
    folder, name = ROOT / "weights/hippocampus", "shipped:hippocampus"
    assert find_folder(name) == folder and find_autoencoder(name) == folder / "vae"
    assert read_model(name).subjects == read_model(folder).subjects and label_names(Path(name)) == label_names(folder)
    assert generate.parse(["--pipeline", name, "--count", "2", "--output", "out"]).pipeline == str(folder)
    masks = ["--masks", "generate:shipped:hippocampus-masks", "--count", "2", "--output", "out"]
    assert generate.parse(["--pipeline", name, *masks]).mask_pipeline == f"{folder}-masks"
    with pytest.raises(FileError, match=r"shipped:hippo: no such shipped weights"):
        find_folder("shipped:hippo")


def test_without_shipped_weights_the_message_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no shipped weights.*weights/ of the clone.*or null to start from random"):
        shipped_folder("shipped:hippocampus/vae", tmp_path / "weights")
