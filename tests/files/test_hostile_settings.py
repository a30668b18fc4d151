"""Settings in files that others wrote: those of LoRAs, schedulers and models. What is out of range, of another type or
not plain is refused by its name, before a library acts on it."""

import inspect
import json
import struct
import time
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from autoencoder.weights import stored_shapes
from diffusion.scheduler_options import check_values, parameters
from files.documents import FileError
from pipelines import MedVolumePipeline
from pipelines.lora import add_lora, save_lora
from pipelines.storage.loading import SCHEDULERS, check_folder
from pipelines.storage.lora_files import read_lora

LORA = "pytorch_lora_weights.safetensors"
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    unet = tiny_pipeline().unet
    add_lora(unet, rank=2, alpha=4, target_modules=["qkv", "conv1"])
    return save_lora(unet, folder, base="0" * 64)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for path in saved.rglob("*"):
        if path.is_file():
            target = tmp_path / "saved" / path.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "saved"


def with_header(lora: Path, target: Path, **settings: object) -> Path:
    """The same tensors, with settings of the header replaced."""
    from safetensors import safe_open

    with safe_open(lora, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    header |= {f"unet.{key}" if "." not in key else key: value for key, value in settings.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(load_file(lora), target, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return target


SETTINGS = [
    *[("r", value) for value in (10**9, 0, -1, 2.5, "2", True, NAN, [2], 10**400)],
    *[("lora_alpha", value) for value in ("4", NAN, INFINITE, -4, 0, True, 1e300, 10**400, [4], {})],
    *[("lora_dropout", value) for value in (1.0, -0.1, NAN, "0", True)],
    *[("target_modules", value) for value in ("qkv", "(([a-z0-9_.])+)+!", "all-linear", {"qkv": 1}, [1], [None], 3)],
    *[("target_modules", [name]) for name in ("(([a-z0-9_.])+)+!", ".*", "qkv|out", "qkv\n", "a b", "q" * 10**6, "")],
    *[
        ("rank_pattern", value)
        for value in ({"(a+)+$": 2}, {"qkv": 0}, {"qkv": 10**9}, {"qkv": "2"}, {"qkv": True}, ["qkv"])
    ],
    *[
        ("alpha_pattern", value)
        for value in ({"(a+)+$": 2}, {"qkv": NAN}, {"qkv": -1}, {"qkv": "2"}, {"qkv": False}, "qkv")
    ],
    *[("use_rslora", value) for value in (1, "yes", [])],
    *[
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["conv_in"]),
        ("layers_to_transform", [0]),
        ("lora_bias", True),
    ],
    *[
        ("layer_replication", [[0, 4]]),
        ("exclude_modules", ".*"),
        ("fan_in_fan_out", True),
        ("target_parameters", ["x"]),
    ],
]


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=[f"{name}-{str(value)[:20]!r}" for name, value in SETTINGS])
def test_settings_of_a_lora_are_checked(lora, tmp_path, name, value):
    path = with_header(lora, tmp_path / LORA, **{name: value})
    began = time.perf_counter()
    with pytest.raises(ValueError, match=name) as refused:
        read_lora(path)
    assert str(path) in str(refused.value) and len(str(refused.value)) < 600 and time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"target_modules": ["qkv"]},
            "target_modules does not name 'down_blocks.0.0.conv1', but there are tensors of it",
        ),
        ({"target_modules": ["qkv", "conv1", "out"]}, "target_modules names 'out', but there are no tensors of it"),
        ({"r": 3}, "has the rank 3 for 'down_blocks.0.0.conv1', whose tensors are of rank 2"),
        (
            {"rank_pattern": {"qkv": 4}},
            "has the rank 4 for 'down_blocks.1.0.attention.qkv', whose tensors are of rank 2",
        ),
        (
            {"target_modules": [f"layer_{n}" for n in range(10**6)]},
            "its settings are .* characters; 4194304 at most are read",
        ),
        ({"alpha_pattern": {f"layer_{n}": 1 for n in range(10**5)}}, "alpha_pattern names 100000 layers"),
        ({"target_modules": ["qkv"] * 10**5}, "target_modules names 100000 layers"),
        ({"base.unet_sha256": "\x1b[2J"}, "names its base '.x1b.2J'; a sha256 is expected"),
        ({"base.unet_sha256": ["0"]}, "names its base"),
    ],
)
def test_settings_that_are_not_those_of_the_tensors_are_refused(lora, tmp_path, settings, reason):
    path = with_header(lora, tmp_path / LORA, **settings)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=reason) as refused:
        read_lora(path)
    assert str(path) in str(refused.value) and time.perf_counter() - began < 5


def test_patterns_reach_peft_as_whole_names_of_layers(lora, tmp_path):
    """The scale of each layer is that of the file: 5 / 2 where the pattern names it, else 4 / 2."""
    found = read_lora(with_header(lora, tmp_path / LORA, alpha_pattern={"attention.qkv": 5}, rank_pattern={"conv1": 2}))
    assert found.settings is not None
    assert (
        found.settings["alpha_pattern"] == {"^down_blocks.1.0.attention.qkv": 5}
        and found.settings["rank_pattern"] == {}
    )
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    scales = {name: layer.scaling["a"] for name, layer in pipe.unet.named_modules() if hasattr(layer, "lora_A")}
    assert scales.pop("down_blocks.1.0.attention.qkv") == 2.5 and set(scales.values()) == {2.0}
    pipe.save_lora_weights(tmp_path / "again")
    again = read_lora(tmp_path / "again" / LORA)
    assert again.settings == found.settings


def test_a_lora_selected_by_a_regex_is_saved_by_names(tmp_path):
    from peft import LoraConfig

    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=r".*\.(qkv|conv1)", alpha_pattern={".*qkv": 6}))
    path = pipe.save_lora_weights(tmp_path)
    found = read_lora(path)
    assert found.settings is not None and "up_blocks.0.0.conv1" in found.settings["target_modules"]
    assert found.settings["alpha_pattern"] == {"^down_blocks.1.0.attention.qkv": 6}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: one * NAN, "not finite"),
        (lambda one: (one + 1) / 0, "not finite"),
        (lambda one: one.to(torch.int32), "torch.int32; floating point"),
        (lambda one: one.bool(), "torch.bool; floating point"),
        (lambda one: one[:0], "is not a matrix, or is empty"),
        (lambda one: one.flatten()[0], "is not a matrix, or is empty"),
    ],
)
def test_factors_that_no_lora_has_are_refused(lora, pipe, tmp_path, change, reason):
    tensors = load_file(lora)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        pipe.load_lora_weights(tensors)
    save_file(tensors, tmp_path / LORA)
    with pytest.raises(ValueError, match=f"{LORA}: .*{reason}"):
        pipe.load_lora_weights(tmp_path)
    assert not hasattr(pipe.unet, "peft_config")


# Schedulers

WRONG = (
    NAN,
    INFINITE,
    -INFINITE,
    1e300,
    -1e300,
    10**9,
    10**400,
    -1,
    "1",
    True,
    [],
    [1.0],
    {},
    {"a": 1},
    None,
    "\x1b[2J",
    [0.5] * 1001,
)
ALLOWED = {  # of these, what an option may be
    "lambda_min_clipped": (-INFINITE, -1),
    "disable_corrector": ([],),
    "variance_type": (None,),
    "trained_betas": (None,),
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"), (None,)),
    **dict.fromkeys(("base_shift", "max_shift"), (-1,)),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), (10**9,)),
    "dynamic_thresholding_ratio": (),
}


def write_scheduler(folder: Path, name: str, options: dict[str, object]) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name} | options))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_option_of_a_scheduler_is_checked(name):
    kind = getattr(diffusers, name)
    defaults, passed = parameters(kind), []
    check_values(kind, defaults)
    for option, default in defaults.items():
        for value in WRONG:
            allowed = ALLOWED.get(option, (True, None) if isinstance(default, bool) else ())
            if option == "solver_p" or any(
                value is one or (value == one and type(value) is type(one)) for one in allowed
            ):
                continue
            try:
                check_values(kind, defaults | {option: value})
            except ValueError as refused:
                assert option in str(refused) and len(str(refused)) < 500 and "\x1b" not in str(refused)
            else:
                passed.append((option, str(value)[:40]))
    assert not passed


def test_a_schedulers_config_in_a_folder_is_checked(folder):
    """Every option, of the class with the most, with a wrong value, before the class sees it."""
    name = "UniPCMultistepScheduler"
    write_scheduler(folder, name, {})
    check_folder(folder)
    for option in parameters(UniPCMultistepScheduler):
        write_scheduler(folder, name, {option: "\x1b[2J" if option != "solver_p" else {"_class_name": "os"}})
        if option != "solver_p":
            with pytest.raises(ValueError, match=f"scheduler_config.json: .*{option}"):
                check_folder(folder)
    for values in (
        {"trained_betas": [0.5] * 10**6},
        {"disable_corrector": [1] * 10**6},
        {"num_train_timesteps": 10**9},
    ):
        write_scheduler(folder, name, values)
        began = time.perf_counter()
        with pytest.raises(ValueError, match=next(iter(values))):
            check_folder(folder)
        assert time.perf_counter() - began < 5


@pytest.mark.parametrize("name", ["PNDMScheduler", "VQDiffusionScheduler", "AmusedScheduler", "SASolverScheduler"])
def test_schedulers_that_fit_no_model_are_not_built(folder, name, monkeypatch):
    def built(*args, **kwargs):
        raise AssertionError("was built")

    monkeypatch.setattr(getattr(diffusers, name), "from_config", built)
    write_scheduler(folder, name, {})
    with pytest.raises(ValueError, match=f"scheduler_config.json: is of '{name}'"):
        MedVolumePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "values", [{"_class_name": ["os", "system"]}, {"_class_name": "utils"}, {"_use_default_values": 3}]
)
def test_private_entries_of_a_scheduler_are_checked(folder, values):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match="scheduler_config.json: is "):
        MedVolumePipeline.from_pretrained(folder)


# Models


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INFINITE, 1e300, 1e-300, "1", True, None])
@pytest.mark.parametrize("name", ["latents_std", "latents_mean"])
def test_latent_statistics_that_no_latents_have_are_refused(folder, pipe, name, value):
    if name == "latents_mean" and value in (0.0, -1.0, 1e-300):
        return
    own = list(pipe.vae.config[name])
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: [value, *own[1:]]}))
    with pytest.raises(ValueError, match=f"{folder / 'vae'}.*{name}") as refused:
        MedVolumePipeline.from_pretrained(folder)
    assert len(str(refused.value)) < 600
    other = tiny_pipeline().vae
    statistics = {"latents_mean": own, "latents_std": own, name: [value, *own[1:]]}
    with pytest.raises(ValueError, match=name):
        other.set_latent_statistics(statistics["latents_mean"], statistics["latents_std"])


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 1000, 1.0, "1", {"0": 1.0}])
def test_latent_statistics_are_one_a_channel(folder, values):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_std": values}))
    with pytest.raises(ValueError, match="latents_std"):
        MedVolumePipeline.from_pretrained(folder)


def numbers_of(config: object, path: tuple = ()) -> list[tuple]:
    """The places of all numbers in a config, but for the records of the training."""
    if isinstance(config, dict):
        parts = [
            (key, value)
            for key, value in config.items()
            if key not in ("data", "subjects") and not str(key).startswith("_")
        ]
        return [found for key, value in parts for found in numbers_of(value, (*path, key))]
    if isinstance(config, list):
        return [found for key, value in enumerate(config) for found in numbers_of(value, (*path, key))]
    return [path] if isinstance(config, int | float) else []


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_every_number_of_a_models_config_is_checked(part, tmp_path):
    model = getattr(tiny_pipeline(), part)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    passed, places = [], numbers_of(whole)
    assert len(places) >= 10
    for place in places:
        for value in (NAN, INFINITE, 1e300, 10**12, 10**400, "x", [[]]):
            config = json.loads(json.dumps(whole))
            inner = config
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path.write_text(json.dumps(config))
            began = time.perf_counter()
            try:
                type(model).from_pretrained(tmp_path)
            except ValueError as refused:
                assert str(tmp_path) in str(refused) and time.perf_counter() - began < 5
            else:
                passed.append((place, str(value)[:20]))
    assert not passed


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("unet", {"in_channels": 10**12, "images": {"ct": 10**12 - 1}}),
        ("unet", {"classes": {f"c{n}": ["a"] for n in range(10**5)}}),
        (
            "unet",
            {
                "blocks": [1] * 10**5,
                "channels": [8] * 10**5,
                "strides": [1] * (10**5 - 1),
                "attention": [False] * 10**5,
            },
        ),
        ("unet", {"objective": "epsilon", "train_steps": 10**9}),
        ("vae", {"encoder_blocks": [0] * 10**5, "decoder_blocks": [0] * 10**5, "channels": [8] * 10**5}),
        ("vae", {"channel_names": ["a"] * 1_100_000}),
        ("unet", {"classes": 5}),
        ("unet", {"numbers": 7}),
        ("unet", {"_class_name": ["os", "system"]}),
        ("unet", {"_class_name": "LatentUNet\u0033D"[:-1] + "\u0044\u200b"}),
    ],
)
def test_configs_that_would_fill_time_or_memory_are_refused(folder, part, values):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=str(folder / part)):
        MedVolumePipeline.from_pretrained(folder)
    assert time.perf_counter() - began < 10


# Weights


@pytest.mark.parametrize("part", ["vae", "unet"])
@pytest.mark.parametrize("value", [NAN, INFINITE])
def test_weights_that_are_not_finite_are_refused(folder, part, value):
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in sorted(tensors) if tensors[key].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 of its .* tensors are not finite in float32 .{name}"):
        MedVolumePipeline.from_pretrained(folder)


def test_numbers_that_a_type_cannot_hold_are_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e6
    save_file(tensors, path, {"format": "pt"})
    MedVolumePipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="not finite in float16 .conv_in.bias"):
        MedVolumePipeline.from_pretrained(folder, torch_dtype=torch.float16)


def test_a_flipped_bit_makes_another_model(folder, pipe):
    """What loading does not notice, the hash does."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    assert MedVolumePipeline.from_pretrained(folder).model_hash != pipe.model_hash


def header_file(path: Path, header: bytes, data: bytes = bytes(64)) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        json.dumps({"a": entry(0, 64, [16]), "b": entry(0, 64, [16])}).encode(),  # overlapping
        json.dumps({"a": entry(0, 128, [32])}).encode(),  # beyond the file
        json.dumps({"a": entry(0, 32, [8]), "b": entry(48, 64, [4])}).encode(),  # with a gap
        json.dumps({"a": entry(0, 64, [2**62, 2**62])}).encode(),
        json.dumps({"a": entry(0, 64, [2**40])}).encode(),
        json.dumps({"a": entry(0, 64, [-16])}).encode(),
        json.dumps({"a": entry(64, 0, [16])}).encode(),
        json.dumps({"a": entry(0, 64, [16], "X99")}).encode(),
        json.dumps({"a": entry(0, 64, [16])}).encode()[:-1]
        + b', "a": '
        + json.dumps(entry(0, 64, [16])).encode()
        + b"}",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
    ],
)
def test_lying_headers_of_safetensors_are_refused(tmp_path, header):
    path = header_file(tmp_path / "a.safetensors", header)
    with pytest.raises(FileError, match="a.safetensors: truncated or corrupt safetensors file"):
        stored_shapes([path])


def test_a_header_longer_than_the_file_or_than_any_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (100, 10**8, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(FileError, match="its header is of"):
            stored_shapes([path])
    with path.open("wb") as file:  # a hole, which takes no room on the disk
        file.write(struct.pack("<Q", 10**8))
        file.truncate(10**8 + 100)
    with pytest.raises(FileError, match="its header is of 100000000 bytes"):
        stored_shapes([path])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_type_are_refused(folder, dtype):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] = tensors["conv_in.bias"].to(dtype)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="1 of another type .conv_in.bias"):
        MedVolumePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(folder, name):
    import os

    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=str(folder)):
        MedVolumePipeline.from_pretrained(folder)


def test_code_is_run_for_no_switch_of_diffusers(folder, tmp_path):
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).mkdir()\nclass MedVolumePipeline: pass\n"
    for place in (folder, tmp_path / "custom"):
        place.mkdir(exist_ok=True)
        (place / "pipeline.py").write_text(code)
    for switches in (
        {"custom_pipeline": str(tmp_path / "custom")},
        {"custom_pipeline": "pipeline", "trust_remote_code": True},
    ):
        with pytest.raises(ValueError, match="are refused: code of a model is never run"):
            MedVolumePipeline.from_pretrained(folder, **switches)
    index = folder / "model_index.json"
    for name in (
        ["pipeline", "MedVolumePipeline"],
        "os.system",
        "\u041cedVolumePipeline",
        "pipeline.MedVolumePipeline",
        3,
        None,
    ):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
        with pytest.raises(ValueError, match="model_index.json is of the class"):
            MedVolumePipeline.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_the_tables_of_this_file_are_of_options_that_there_are():
    known = {option for name in SCHEDULERS for option in inspect.signature(getattr(diffusers, name)).parameters}
    assert set(ALLOWED) <= known
