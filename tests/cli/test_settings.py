"""Every number of every setting has a range, and values outside are refused by name."""

import argparse
import ast
import dataclasses
import inspect
import math
import os
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import yaml

import evaluate
import generate
from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
from cli.settings import (
    Number,
    PositiveInt,
    Range,
    construct,
    describe,
    faults,
    hints_of,
    show_ranges,
)
from diffusion import LatentCacheConfig, LatentUNet3D
from evaluation.report import read_config
from training import TrainLdmConfig, TrainVaeConfig, build_model, ldm_config, parse_config, save_config, vae_config
from training.engine import config as engine_config
from training.engine.config import LoopConfig, OptimizerConfig
from training.vae_config import AdversarialConfig, CropConfig, crop_faults
from volumes import DataConfig, IntensityScaling, PhantomConfig, load_cases

VAE = "autoencoder.AutoencoderKL3D"
CONFIGS = [
    *(
        one
        for module in (engine_config, vae_config, ldm_config)
        for _, one in inspect.getmembers(module, dataclasses.is_dataclass)
        if one.__module__ == module.__name__
    ),
    *(DataConfig, PhantomConfig, IntensityScaling, LatentCacheConfig),
]
MODELS = [AutoencoderKL3D, VQGAN3D, SpaceToDepth3D, LatentUNet3D]


def numbers_in(hint, path=()):
    """(range or None, how a value is put where the number is) of every number in an annotation."""
    base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    origin, args = get_origin(base), get_args(base)
    if base in (int, float):
        yield base, next((mark for mark in marks if isinstance(mark, Range)), None), path
    elif origin in (Union, types.UnionType):
        for one in args:
            yield from numbers_in(one, path)
    elif origin is dict:
        yield from numbers_in(args[0], (*path, "key"))
        yield from numbers_in(args[1], (*path, "value"))
    elif origin is tuple and args[-1] is not Ellipsis:
        for one in args:
            yield from numbers_in(one, (*path, len(args)))
    elif origin is not None and origin is not Literal:
        yield from numbers_in(args[0], (*path, 1))


def placed(value, path):
    """The value as deep in lists and mappings as the annotation has its number."""
    for step in reversed(path):
        value = {value: "x"} if step == "key" else {"x": value} if step == "value" else [value] * step
    return value


def outside(limits):
    """Numbers that a range has not."""
    yield from (math.nan, math.inf, -math.inf)
    if limits.low is not None:
        yield limits.low if limits.above else limits.low - 1
    if limits.high is not None:
        yield limits.high if limits.below else limits.high + 1


ALL = [
    (owner, name, *found)
    for owner in [*CONFIGS, *MODELS]
    for name, hint in hints_of(owner).items()
    for found in numbers_in(hint)
]


def test_the_table_walks_over_all_settings():
    names = {f"{owner.__name__}.{name}" for owner, name, *_ in ALL}
    some = (
        "OptimizerConfig.max_grad_norm LoopConfig.ema_decay AutoencoderLosses.kl LoraConfig.rank IntensityScaling.low"
    )
    assert set(some.split()) | {"LatentUNet3D.condition_dropout", "DataConfig.time_point", "VQGAN3D.num_codes"} <= names
    assert len(ALL) > 100


@pytest.mark.parametrize(("owner", "name", "base", "limits", "path"), ALL)
def test_every_number_has_a_range_and_is_refused_outside_of_it(owner, name, base, limits, path):
    assert limits is not None, f"{owner.__name__}.{name} has no range: Annotated[..., Range(...)]"
    for value in outside(limits):
        if base is int and not math.isfinite(value) and "key" in path:
            continue  # NaN and infinity are not keys of YAML
        (said, *_) = list(faults(owner, {name: placed(value, path)}, "section.", raw=True))
        assert (
            said.startswith(f"section.{name}") and "expected" in said and repr(limits) in said.replace(", or null", "")
        )


@pytest.mark.parametrize("owner", CONFIGS)
def test_defaults_lie_in_their_ranges(owner):
    defaults = {
        field.name: field.default for field in dataclasses.fields(owner) if field.default is not dataclasses.MISSING
    }
    assert not list(faults(owner, defaults, raw=True))


def test_constructors_refuse_what_configs_refuse():
    with pytest.raises(ValueError, match="max_grad_norm: got nan, expected a number, 0 or more"):
        OptimizerConfig(max_grad_norm=math.nan)
    with pytest.raises(ValueError, match=r"AutoencoderKL3D: channels\[1\]: got 0, expected a whole number, 1 or more"):
        AutoencoderKL3D(channels=(8, 0))
    with pytest.raises(ValueError, match=r"condition_dropout.mask: got 1.5, expected a number, 0 or more and below 1"):
        LatentUNet3D(condition_dropout={"mask": 1.5})


SETTINGS = f"output: out\nvae: v\ndata: {{images: 'x/{{case}}.nii.gz'}}\nmodel: {{class: {VAE}}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loop: {batch_size: many}", "loop.batch_size: got 'many' (text), expected a whole number, 1 or more"),
        ("loop: {workers: many}", "loop.workers: got 'many' (text), expected a whole number, from 0 to 1024, or null"),
        ("loop: {batch_size: true}", "loop.batch_size: got true, expected a whole number, 1 or more"),
        ("loop: {max_steps: 10.0}", "loop.max_steps: got 10.0, expected a whole number, 1 or more"),
        ("loop: {compile: maybe}", "loop.compile: got 'maybe' (text), expected true or false"),
        (
            "loop: {mixed_precision: off}",
            "loop.mixed_precision: got 'off' (text), expected one of auto, no, bf16, fp16",
        ),
        (f"loop: {{max_steps: 1{'0' * 400}}}", "loop.max_steps: got 1000"),
        (f"optimizer: {{learning_rate: 1{'0' * 400}}}", "optimizer.learning_rate: got 1000"),
        (
            "loop: {timeout_minutes: 1.0e+300}",
            "loop.timeout_minutes: got 1e+300, expected a number, above 0 and 527040 or less",
        ),
        ("cache: {folder: 5}", "cache.folder: got 5, expected a path, or null; put it in quotes"),
        ("resume: ''", "resume: is empty; expected a path"),
        ("loop: {trackers: csv}", "loop.trackers: got 'csv' (text), expected a list, each text"),
        ("loop: {batchsize: 3}", "loop.batchsize: is not a setting; did you mean loop.batch_size?"),
        ("batch_size: 3", "batch_size: is not a setting; did you mean loop.batch_size?"),
        ("loop: {ema_decay: 1.5}", "loop.ema_decay: got 1.5, expected a number, 0 or more and below 1"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate: got nan, expected a number, above 0"),
        ("optimizer: {learning_rate: null}", "optimizer.learning_rate: got null, expected a number, above 0"),
        ("optimizer: {max_grad_norm: -1}", "optimizer.max_grad_norm: got -1, expected a number, 0 or more"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: got [0.9], expected a list of 2, each a number, 0 or more and"),
        ("optimizer: 3", "optimizer: got 3, expected settings {algorithm, learning_rate"),
        ("lora: {rank: 0}", "lora.rank: got 0, expected a whole number, 1 or more"),
        ("lora: {target_modules: {qkv: 1}}", "lora.target_modules: got {'qkv': 1}, expected a list, each text"),
        ("cache: {scale: 1}", "cache.scale: got 1, expected a number, 0 or more and below 1"),
        ("cache: {flip_axes: [3]}", "cache.flip_axes[0]: got 3, expected a whole number, from 0 to 2"),
    ],
)
def test_a_wrong_setting_of_a_file_is_named_with_the_file(text, said, tmp_path):
    path = tmp_path / "ldm.yaml"
    path.write_text(f"{SETTINGS}{text}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: {said}")):
        parse_config(TrainLdmConfig, [f"--config={path}"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"intensity": {"kind": "window", "low": 5, "high": 1}},
            "data.intensity: intensity low (5.0) must be below high (1.0)",
        ),
        ({"intensity": {"kind": "percentile", "low": 5, "high": 101}}, "percentiles lie in 0-100, got 5.0 and 101.0"),
        ({"intensity": {"kind": "window", "low": math.nan}}, "data.intensity.low: got nan, expected a finite number"),
        (
            {"intensity": {"image": {"kind": "window", "lo": 1}}},
            "data.intensity.image.lo: is not a setting; did you mean",
        ),
        ({"crop": {"above": "Mask"}}, """data.crop.above: got 'Mask' (text), expected a finite number, or "mask\""""),
        ({"root": None}, 'data.root: got null, expected a path; for the home folder write "~", in quotes'),
        ({"spacing": [1, 1, 0]}, "data.spacing[2]: got 0, expected a number, above 0"),
        ({"label_names": {"a": "b"}}, "data.label_names: the key 'a': got 'a' (text), expected a whole number"),
        ({"label_names": {0: 1}}, "data.label_names.0: got 1, expected text; put it in quotes"),
        ({"classes": {"grade": [1, 2]}}, "data.classes.grade[0]: got 1, expected text; put it in quotes"),
        ({"label_names": {70000: "x"}}, "the key 70000: got 70000, expected a whole number, from -32768 to 32767"),
        ({"test_fraction": 1}, "data.test_fraction: got 1, expected a number, 0 or more and below 1"),
        ({"images": 3}, "data.images: got 3, expected a path"),
        ({"phantom": {"count": 0}}, "data.phantom.count: got 0, expected a whole number, 1 or more"),
        (
            {"phantom": "yes"},
            "data.phantom: got 'yes' (text), expected settings {count, shape, seed, lesion_voxels, lesions}, or null",
        ),
    ],
)
def test_a_wrong_setting_below_a_union_is_named(data, said, tmp_path):
    path = tmp_path / "vae.yaml"
    whole = {"output": "out", "data": {"images": "x/{case}.nii.gz", **data}, "model": {"class": VAE}}
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_config(TrainVaeConfig, [f"--config={path}"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--adversarial.weight=x", "adversarial.weight: got 'x' (text), expected a number, 0 or more"),
        (
            "--adversarial.optimizer.learning_rate=.inf",
            "adversarial.optimizer.learning_rate: got inf, expected a number, above",
        ),
        ("--loop.max_stepz=3", "loop.max_stepz: is not a setting; did you mean loop.max_steps?"),
        ("--loop.workers=many", "loop.workers: got 'many' (text), expected a whole number, from 0 to 1024, or null"),
        ("--losses.kl=-1", "losses.kl: got -1, expected a number, 0 or more"),
    ],
)
def test_a_wrong_argument_is_named(argument, said, tmp_path):
    path = tmp_path / "vae.yaml"
    path.write_text(SETTINGS.replace("vae: v\n", ""))
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        parse_config(TrainVaeConfig, [f"--config={path}", argument])


def test_numbers_as_text_are_read(tmp_path):
    path = tmp_path / "vae.yaml"
    path.write_text(
        SETTINGS.replace("vae: v\n", "") + "optimizer: {learning_rate: 1e-4, eps: '1e-7'}\nloop: {compile: 'true'}"
    )
    config = parse_config(TrainVaeConfig, [f"--config={path}", "--optimizer.weight_decay", "2e-2"])
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.eps, optimizer.weight_decay) == (1e-4, 1e-7, 0.02)
    assert config.loop.compile is True


def test_words_and_numbers_are_what_they_look_like(tmp_path):
    """In YAML 1.1, which PyYAML reads, `no` is false, 010 is eight and 1:30 ninety."""
    path = tmp_path / "vae.yaml"
    path.write_text(
        "output: no\ndata: {images: x, classes: {smoker: [yes, no]}, label_names: {0: off, 010: on}}\n"
        f"model: {{class: {VAE}}}\nloop: {{mixed_precision: no, compile: no, fsdp: off, max_steps: 0120}}\n"
        "gradient_checkpointing: yes\noptimizer: {learning_rate: 1e-4, eps: .5}\n"
    )
    config = parse_config(TrainVaeConfig, ["--config", str(path)])
    assert (config.loop.mixed_precision, config.data.classes) == ("no", {"smoker": ["yes", "no"]})
    assert Path(config.output).resolve() == tmp_path / "no"
    assert (config.loop.compile, config.loop.fsdp, config.gradient_checkpointing) == (False, False, True)
    assert (config.data.label_names, config.loop.max_steps) == ({0: "off", 10: "on"}, 120)
    assert (config.optimizer.learning_rate, config.optimizer.eps) == (1e-4, 0.5)
    saved = tmp_path / "config.yaml"
    save_config(config, saved)
    assert "output: 'no'" in saved.read_text()
    assert parse_config(TrainVaeConfig, ["--config", str(saved)]) == config
    nested = parse_config(TrainVaeConfig, ["--config", str(path), "--loop", "{mixed_precision: no}"])
    assert nested.loop.mixed_precision == "no"


def test_numbers_of_numpy_are_made_plain(tmp_path):
    """YAML cannot hold them, which would be seen when the run is saved."""
    loop = LoopConfig(max_steps=np.int64(5), ema_decay=np.float64(0.5), timeout_minutes=np.float32(2))
    data = DataConfig(images="x", spacing=(np.float32(1), 1.0, 2.0), label_names={np.int16(0): "a", np.int16(1): "b"})
    vae = TrainVaeConfig(str(tmp_path), data, {"class": VAE}, crops=CropConfig(shape=(np.int64(8), 8, 8)), loop=loop)
    assert [type(one) for one in (loop.max_steps, loop.ema_decay, loop.timeout_minutes)] == [int, float, float]
    save_config(vae, tmp_path / "config.yaml")
    vae.output = os.path.relpath(tmp_path)
    vae.data.root = "."
    assert parse_config(TrainVaeConfig, ["--config", str(tmp_path / "config.yaml")]) == vae


def test_a_setting_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "ldm.yaml"
    path.write_text(f"{SETTINGS}loop: {{max_steps: 5}}\nloop: {{batch_size: 2}}\n")
    with pytest.raises(ValueError, match="'loop' is set twice, in line 5 and here"):
        parse_config(TrainLdmConfig, [f"--config={path}"])


def test_options_are_written_out(tmp_path):
    """A shortened --vae or --config would be read by the parser, but not by what takes over the autoencoder's
    preprocessing."""
    path = tmp_path / "ldm.yaml"
    path.write_text(SETTINGS)
    for option, meant in (
        ("--loop.max_step", "did you mean loop.max_steps?"),
        ("--conf", "valid here"),
        ("--va", "mean vae"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{option[2:]}: is not a setting; ") + f".*{re.escape(meant)}"):
            parse_config(TrainLdmConfig, [f"--config={path}", option, str(path)])


def test_combinations_are_refused(tmp_path, caplog):
    path = tmp_path / "vae.yaml"
    path.write_text(SETTINGS.replace("vae: v\n", ""))
    for arguments, said in (
        (["--losses.l1=0", "--losses.gradient=0"], "losses: l1, mse, gradient and spectrum are all 0"),
        (
            ["--adversarial.weight=0", "--adversarial.feature_matching=0"],
            "adversarial: weight and feature_matching are both 0",
        ),
        (["--adversarial.slices=0", "--adversarial.volume=false"], "adversarial: slices is 0 and volume is false"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_config(TrainVaeConfig, [f"--config={path}", *arguments])
    parse_config(TrainVaeConfig, [f"--config={path}", "--loop.max_steps=10", "--adversarial.start_step=10"])
    assert "warmup_steps 100 exceeds loop.max_steps 10: the learning rate ends at 0.0001 of 0.001" in caplog.text
    assert "the discriminator never starts" in caplog.text


def test_crops_fit_stride_and_discriminator():
    assert crop_faults(CropConfig((16, 12, 24)), (4, 4, 4)) == []
    assert crop_faults(CropConfig((16, 14, 1)), (4, 4, 4)) == [
        ("crops.shape [16, 14, 1] is not a multiple of the autoencoder's stride [4, 4, 4]", "use [16, 16, 4]")
    ]
    ((message, remedy),) = crop_faults(CropConfig((16, 16, 16)), (4, 4, 4), AdversarialConfig(layers=3))
    assert "a discriminator of 3 layers needs 24 voxels per side" in message and "adversarial.layers" in remedy


def test_a_model_section_is_checked_by_name():
    for section, said in (
        ({"latent_channels": 0}, "model.latent_channels: got 0, expected a whole number, 1 or more"),
        ({"latent_channels": "four"}, "model.latent_channels: got 'four' (text), expected a whole number"),
        ({"chanels": [8, 8]}, "model.chanels: is not a setting; did you mean model.channels?"),
        ({"patch_size": [2, 2, "a"]}, "model.patch_size[2]: got 'a' (text), expected a whole number, 1 or more"),
        ({"channels": 8}, "model.channels: got 8, expected a list, each a whole number, 1 or more"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            build_model({"class": VAE, **section})


def test_paths_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {
        "root": "~/data",
        "table": "~/t.csv",
        "images": {"ct": "~/{case}.nii"},
        "masks": "masks/~x.nii",
        "label_names": {0: "~"},
    }
    values: dict[str, Any] = {"output": "~/run", "data": data, "model": {}, "init_from": "~/vae", "resume": "latest"}
    config = construct(TrainVaeConfig, {**values, "perceptual": {"network": "~/vgg"}})
    home = str(tmp_path)
    assert (config.output, config.init_from, config.resume) == (f"{home}/run", f"{home}/vae", "latest")
    assert (config.data.root, config.data.table, config.data.images) == (
        f"{home}/data",
        f"{home}/t.csv",
        {"ct": f"{home}/{{case}}.nii"},
    )
    assert (config.data.masks, config.data.label_names, config.perceptual.network) == (
        "masks/~x.nii",
        {0: "~"},
        f"{home}/vgg",
    )


def test_home_is_found_in_every_path_of_a_data_section(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "scans").mkdir()
    for name in ("a", "b"):
        (tmp_path / "scans" / f"{name}.nii.gz").write_bytes(b"not read")
    (tmp_path / "table.csv").write_text("file\n~/scans/a.nii.gz\n~/scans/b.nii.gz\n")
    expected = [tmp_path / "scans" / f"{name}.nii.gz" for name in ("a", "b")]
    for settings in (
        {"root": "~/scans", "images": "{case}.nii.gz"},
        {"root": "elsewhere", "images": "~/scans/{case}.nii.gz"},
        {"root": "elsewhere", "table": "~/table.csv", "images": "{file}"},
        {"root": "file://~/scans", "images": ["{case}.nii.gz"]},
    ):
        cases = load_cases(DataConfig(validation_fraction=0.0, **settings))
        assert [case.images["image"] for case in cases] == expected
        assert [case.name for case in cases] in (["a", "b"], ["scans_a", "scans_b"])


def test_an_evaluation_names_what_is_wrong_in_the_config(tmp_path):
    path = tmp_path / "ldm.yaml"
    path.write_text("vae: ~/v\ndata: {images: x, test_fraction: 1.5}\n")
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: data.test_fraction: got 1.5, expected a number, 0 or more")
    ):
        read_config(path)
    path.write_text("vae: ~/v\ndata: {images: x}\n")
    assert read_config(path)["vae"] == str(Path.home() / "v")


def test_help_shows_the_ranges(capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainVaeConfig, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for said in (
        "from a normal distribution; only KL autoencoders have it. [a number, 0 or more; default: 0.0001]",
        "The average is validated and saved. [a number, 0 or more and below 1; default: 0.999]",
    ):
        assert said in shown


def test_a_number_on_a_plain_command_line(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=Number(PositiveInt), default=1, help="volumes (1)")
    show_ranges(parser)
    assert parser.parse_args(["--count", "3"]).count == 3
    for text, said in (("0", "got 0"), ("x", "got 'x' (text)"), ("1.5", "got '1.5' (text)")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--count", text])
        assert f"--count: {said}, expected a whole number, 1 or more" in capsys.readouterr().err
    assert "volumes (1) [a whole number, 1 or more]" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("limits", "said", "inside", "beyond"),
    [
        (Range(1), "1 or more", [1, 7], [0, 0.999]),
        (Range(0, above=True), "above 0", [1e-9], [0, -1]),
        (Range(0, 1, below=True), "0 or more and below 1", [0, 0.5], [1, -0.1]),
        (Range(0, 180), "from 0 to 180", [0, 180], [180.1]),
        (Range(), "finite", [-1e300], [10**400]),
    ],
)
def test_ranges(limits, said, inside, beyond):
    assert repr(limits) == said
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in [*beyond, math.nan, math.inf, -math.inf])


def test_descriptions_are_sentences():
    assert describe(PositiveInt | None) == "a whole number, 1 or more, or null"
    assert describe(Literal["a", "b"]) == "one of a, b"
    assert describe(tuple[PositiveInt, PositiveInt]) == "a list of 2, each a whole number, 1 or more"


def test_every_number_on_a_command_line_has_a_range():
    """No `add_argument(type=int)`: a bare int or float says nothing of what it may be."""
    root = Path(__file__).parents[2]
    found, ranged = [], 0
    for path in [
        root / "generate.py",
        root / "evaluate.py",
        root / "demo.py",
        *sorted((root / "evaluation").rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                kind = next((word.value for word in node.keywords if word.arg == "type"), None)
                ranged += isinstance(kind, ast.Call) and getattr(kind.func, "id", "") == "Number"
                if isinstance(kind, ast.Name) and kind.id in ("int", "float"):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == [] and ranged > 40


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--count", "0", "got 0, expected a whole number, 1 or more"),
        ("--seed", "-1", "got -1, expected a whole number, 0 or more"),
        ("--batch_size", "two", "got 'two' (text), expected a whole number, 1 or more"),
        ("--steps", "nan", "got 'nan' (text), expected a whole number, 1 or more"),
    ],
)
def test_generation_refuses_numbers_outside_of_their_ranges(option, value, said, capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--pipeline", "p", "--masks", "m", "--output", "o", f"{option}={value}"])
    assert f"{option}: {said}" in capsys.readouterr().err


def test_evaluation_refuses_numbers_outside_of_their_ranges(tmp_path, capsys):
    path = tmp_path / "ldm.yaml"
    path.write_text("data: {images: x}\n")
    common = ["--config", str(path), "--output", "o"]
    for options, said in (
        (
            ["privacy", *common, "--synthetic", "s", "--alpha=1"],
            "--alpha: got 1.0, expected a number, above 0 and below 1",
        ),
        (
            ["privacy", *common, "--synthetic", "s", "--flips", "3"],
            "--flips: got 3, expected a whole number, from 0 to 2",
        ),
        (["dice", *common, "--synthetic", "s", "--seeds=0"], "--seeds: got 0, expected a whole number, 1 or more"),
    ):
        with pytest.raises(SystemExit):
            evaluate.parse(options)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--data.test_fraction=x", "data.test_fraction: got 'x' (text), expected a number, 0 or more and below 1"),
        ("--data.spacing=[1,1]", "data.spacing: got [1, 1], expected a list of 3, each a number, above 0"),
    ],
)
def test_an_override_of_an_evaluation_is_named(option, said, tmp_path, capsys):
    path = tmp_path / "ldm.yaml"
    path.write_text("data: {images: x}\n")
    with pytest.raises(SystemExit):
        evaluate.parse(["dice", "--config", str(path), "--output", "o", "--synthetic", "s", option])
    assert said in capsys.readouterr().err


def test_a_combination_in_an_override_of_an_evaluation_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "ldm.yaml"
    path.write_text("data: {images: x, root: ~/scans}\n")
    common = ["dice", "--config", str(path), "--output", "o", "--synthetic", "s"]
    with pytest.raises(ValueError, match="^data.intensity: intensity low .5.0. must be below high .1.0.$"):
        evaluate.parse([*common, "--data.intensity={kind: window, low: 5, high: 1}"])
    assert evaluate.parse(common).dice.data.root == str(tmp_path / "scans")
