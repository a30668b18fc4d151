"""LoRA on the latent U-Net: what training leaves is what the pipeline loads; scales, fusing, files, what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import nibabel as nib
import pytest
import torch
import yaml
from generating import generate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_runs import Interrupted, everything, run
from tiny import mask_image, tiny_pipeline

import generate as command
import train_ldm
from pipelines import MedVolumePipeline, SamplingConfig, VolumeRequest
from pipelines.lora import add_lora, save_lora
from pipelines.storage.trained_on import read_model
from training import LdmTrainingStep, LoraConfig, TrainLdmConfig, initialize_from, parse_config
from training.ldm import attach_lora
from volumes.data.config import DataConfig, PhantomConfig

peft = pytest.importorskip("peft")
FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["qkv", "out", "time", "conv1", "conv2"]
ROOT = Path(__file__).resolve().parents[2]


def trained_lora(folder: Path, seed: int = 0, rank: int = 4, base_seed: int = 0, **unet):
    """A pipeline whose U-Net has a LoRA that changes much, and its file in `folder`."""
    pipe = tiny_pipeline(base_seed, **unet)
    base = pipe.unet_hash
    torch.manual_seed(seed)
    add_lora(pipe.unet, rank=rank, alpha=2 * rank, target_modules=TARGETS)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_lora(pipe.unet, folder, base)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The LoRA's folder, the base's volume, the volume with the LoRA."""
    folder = tmp_path_factory.mktemp("lora")
    return folder, generate(tiny_pipeline()), generate(trained_lora(folder))


def contents(path: Path) -> tuple[dict[str, list], dict[str, str]]:
    """Values and header; the bytes of a safetensors file depend on the order of a hash map."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).tolist() for key in sorted(file.keys())}, file.metadata()


def close(a, b):
    torch.testing.assert_close(a, b, atol=200 * 1e-5, rtol=0)  # 1e-5 of the scale


def test_a_fresh_lora_changes_nothing_and_alone_is_trained():
    pipe, expected = tiny_pipeline(), generate(tiny_pipeline())
    add_lora(pipe.unet, rank=2, alpha=2, target_modules=["qkv", "conv1"])
    close(generate(pipe), expected)
    trained = {name for name, p in pipe.unet.named_parameters() if p.requires_grad}
    assert trained == {
        f"{block}.{layer}.lora_{factor}.default.weight"
        for block, layers in {
            "down_blocks.0.0": ["conv1"],
            "down_blocks.1.0": ["conv1", "attention.qkv"],
            "up_blocks.0.0": ["conv1"],
        }.items()
        for layer in layers
        for factor in "AB"
    }


def test_loaded_is_what_was_trained(saved):
    folder, base, expected = saved
    assert (expected - base).abs().max() > 5
    for source in (folder, folder / FILE):
        pipe = tiny_pipeline()
        pipe.load_lora_weights(source)
        assert torch.equal(generate(pipe), expected)
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_the_command_takes_a_lora(saved, tmp_path):
    folder, *_ = saved
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "masks").mkdir()
    nib.save(mask_image((16, 16, 16)), tmp_path / "masks" / "a.nii.gz")
    records = []
    for name, more in (("plain", []), ("lora", ["--lora", str(folder)])):
        command.main(
            [
                *("--pipeline", str(tmp_path / "pipeline"), "--masks", str(tmp_path / "masks"), "--steps", "2"),
                *("--output", str(tmp_path / name), *more),
            ]
        )
        records.append(json.loads((tmp_path / name / "a_000.json").read_text()))
    plain, lora = (nib.load(tmp_path / name / "a_000.nii.gz").get_fdata() for name in ("plain", "lora"))
    assert abs(plain - lora).max() > 1 and records[0]["model"] != records[1]["model"]


def test_scales_are_between_base_and_lora(saved):
    folder, base, expected = saved
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder, adapter_name="look")
    pipe.set_adapters("look", 0.0)
    assert torch.equal(generate(pipe), base)
    pipe.set_adapters("look", 0.5)
    half = generate(pipe)
    assert min((half - base).abs().max(), (half - expected).abs().max()) > 1
    pipe.set_adapters("look")
    assert torch.equal(generate(pipe), expected)
    pipe.disable_lora()
    close(generate(pipe), base)
    pipe.enable_lora()
    pipe.load_lora_weights(folder, adapter_name="twice")
    pipe.set_adapters(["look", "twice"], [0.5, 0.5])
    close(generate(pipe), expected)


def test_a_second_lora_acts_beside_the_first(saved, tmp_path):
    folder, _, expected = saved
    trained_lora(tmp_path, seed=1)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_active_adapters() == ["default_0", "default_1"]
    assert (generate(pipe) - expected).abs().max() > 5
    pipe.delete_adapters("default_1")
    close(generate(pipe), expected)


def test_fused_unfused_and_unloaded(saved, tmp_path):
    folder, base, expected = saved
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    weights = pipe.unet.down_blocks[0][0].conv1.get_base_layer().weight.clone()
    close(generate(pipe), expected)
    for forbidden in (
        pipe.fuse_lora,
        lambda: pipe.set_adapters("default_0", 0.5),
        lambda: pipe.load_lora_weights(folder),
    ):
        with pytest.raises(ValueError, match="are fused into the weights; unfuse_lora"):
            forbidden()
    pipe.unfuse_lora()
    assert not torch.equal(pipe.unet.down_blocks[0][0].conv1.get_base_layer().weight, weights)
    close(generate(pipe), expected)
    pipe.unload_lora_weights()
    close(generate(pipe), base)
    with pytest.raises(ValueError, match="no LoRA acts"):
        pipe.fuse_lora()

    pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match="a LoRA is attached: save it separately"):
        pipe.save_pretrained(tmp_path / "attached")
    with pytest.raises(ValueError, match="set the scale first"):
        pipe.fuse_lora(lora_scale=0.5)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "sum")
    whole = MedVolumePipeline.from_pretrained(tmp_path / "sum")
    whole.set_progress_bar_config(disable=True)
    close(generate(whole), expected)
    assert whole.model_hash == pipe.model_hash != tiny_pipeline().model_hash


def test_a_sidecar_never_claims_the_base(saved, tmp_path):
    """The hash follows what acts, and nothing else: not names, not whether it is fused."""
    tiny_pipeline().save_pretrained(tmp_path / "stored")
    for make in (tiny_pipeline, lambda: MedVolumePipeline.from_pretrained(tmp_path / "stored")):
        pipe = make()
        base = pipe.model_hash
        pipe.load_lora_weights(saved[0])
        active = pipe.model_hash
        assert active != base and pipe.record(VolumeRequest(), SamplingConfig()).model == active
        pipe.fuse_lora()
        assert pipe.model_hash == active
        pipe.unfuse_lora()
        assert pipe.model_hash == active
        pipe.set_adapters("default_0", 0.5)
        assert pipe.model_hash not in (base, active)
        pipe.set_adapters("default_0", 0.0)
        assert pipe.model_hash == base
        pipe.set_adapters("default_0")
        pipe.disable_lora()
        assert pipe.model_hash == base
        pipe.unload_lora_weights()
        assert pipe.model_hash == base
        pipe.load_lora_weights(saved[0], adapter_name="other")
        assert pipe.model_hash == active
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert pipe.model_hash not in (base, active)


def test_a_fused_lora_is_neither_disabled_nor_deleted(saved):
    """peft would take it out of the weights at the next call, or leave it in them without a trace: the hash would
    lie."""
    folder, _, expected = saved
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder)
    active = pipe.model_hash
    pipe.fuse_lora()
    for forbidden in (pipe.disable_lora, lambda: pipe.delete_adapters("default_0")):
        with pytest.raises(ValueError, match="are fused into the weights; unfuse_lora"):
            forbidden()
    close(generate(pipe), expected)
    assert pipe.model_hash == active


def test_a_lora_acts_at_once_after_others_were_disabled(saved, tmp_path):
    trained_lora(tmp_path, seed=1)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path)
    pipe.disable_lora()
    pipe.load_lora_weights(saved[0])
    assert pipe.get_active_adapters() == ["default_1"]
    close(generate(pipe), saved[2])


def test_the_last_lora_leaves_plain_layers(saved, tmp_path):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(saved[0])
    pipe.delete_adapters("default_0")
    pipe.save_pretrained(tmp_path)
    assert MedVolumePipeline.from_pretrained(tmp_path).model_hash == tiny_pipeline().model_hash


def test_a_pipeline_that_cannot_be_saved_keeps_the_folder(saved, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    other = tiny_pipeline(seed=1)
    other.load_lora_weights(saved[0])
    with pytest.raises(ValueError, match="a LoRA is attached"):
        other.save_pretrained(tmp_path)
    assert MedVolumePipeline.from_pretrained(tmp_path).model_hash == tiny_pipeline().model_hash


def test_the_file_is_diffusers_format(saved, tmp_path):
    folder, _, expected = saved
    with safe_open(folder / FILE, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert header["unet.r"] == 4 and header["unet.lora_alpha"] == 8 and header["unet.target_modules"] == sorted(TARGETS)
    assert header["base.unet_sha256"] == tiny_pipeline().unet_hash
    assert shapes["unet.down_blocks.1.0.conv1.lora_A.weight"] == [4, 16, 3, 3, 3]
    assert shapes["unet.down_blocks.1.0.conv1.lora_B.weight"] == [16, 4, 1, 1, 1]
    pipe = tiny_pipeline()
    pipe.unet.load_lora_adapter(str(folder / FILE), prefix="unet", use_safetensors=True)  # diffusers' own reader
    assert torch.equal(generate(pipe), expected)
    copy = pipe.save_lora_weights(tmp_path)
    assert contents(copy) == contents(folder / FILE)


def test_a_lora_comes_from_the_hub(saved, tmp_path):
    """From the local cache of a client that is offline, as every test is."""
    snapshot = tmp_path / "models--user--look" / "snapshots" / ("0" * 40)
    shutil.copytree(saved[0], snapshot)
    (tmp_path / "models--user--look" / "refs").mkdir()
    (tmp_path / "models--user--look" / "refs" / "main").write_text("0" * 40)
    pipe = tiny_pipeline()
    pipe.load_lora_weights("user/look", cache_dir=tmp_path)
    assert torch.equal(generate(pipe), saved[2])


def test_the_subfolder_of_a_local_folder_is_loaded(saved, tmp_path, monkeypatch):
    """Another LoRA lies where the subfolder was ignored; `~` is the home folder."""
    trained_lora(tmp_path / "both", seed=1)
    shutil.copytree(saved[0], tmp_path / "both" / "look")
    (tmp_path / "both" / "look" / FILE).rename(tmp_path / "both" / "look" / "own.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = tiny_pipeline()
    pipe.load_lora_weights("~/both", subfolder="look", weight_name="own.safetensors")
    assert torch.equal(generate(pipe), saved[2])
    assert pipe.save_lora_weights("~/copy") == tmp_path / "copy" / FILE
    pipe.unload_lora_weights()
    for more, message in (
        ({"subfolder": "other"}, f"both/other/{FILE}: no such file"),
        ({"weight_name": "x.safetensors"}, "both/x.safetensors: no such file"),
    ):
        with pytest.raises(OSError, match=message):
            pipe.load_lora_weights(tmp_path / "both", **more)
    with pytest.raises(ValueError, match="is the file itself; give weight_name and subfolder with its folder"):
        pipe.load_lora_weights(tmp_path / "both" / FILE, subfolder="look")
    assert not getattr(pipe.unet, "peft_config", {})


def test_keywords_of_a_lora_that_nothing_reads_are_refused(saved):
    pipe = tiny_pipeline()
    for call, keyword in (
        (lambda **more: pipe.load_lora_weights(saved[0], **more), "nonsense"),
        (lambda **more: pipe.load_lora_weights(saved[0], **more), "prefix"),
        (lambda **more: pipe.lora_state_dict(saved[0], **more), "nonsense"),
        (lambda **more: pipe.save_lora_weights(saved[0], **more), "text_encoder_lora_layers"),
        (lambda **more: pipe.fuse_lora(**more), "fuse_unet"),
        (lambda **more: pipe.unfuse_lora(**more), "unfuse_unet"),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword arguments?:? '?{keyword}"):
            call(**{keyword: 1})
    with pytest.raises(ValueError, match="use_safetensors=False is refused"):
        pipe.load_lora_weights(saved[0], use_safetensors=False)


def test_state_dicts_as_diffusers_saves_and_loads_them(saved, tmp_path, caplog):
    """Of a LoRA whose alpha is twice its rank: with its settings it acts so; without them as if alpha were its rank."""
    folder, _base, expected = saved
    trained = trained_lora(tmp_path / "own")
    layers = peft.get_peft_model_state_dict(trained.unet)
    settings = trained.unet.peft_config["default"].to_dict()
    path = MedVolumePipeline.save_lora_weights(
        tmp_path / "new", unet_lora_layers=layers, unet_lora_adapter_metadata=settings
    )
    state, metadata = MedVolumePipeline.lora_state_dict(tmp_path / "new", return_lora_metadata=True)
    assert (
        metadata["unet.lora_alpha"] == 8 and load_file(path).keys() == state.keys() == load_file(folder / FILE).keys()
    )
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path / "new")
    assert torch.equal(generate(pipe), expected)

    halved = tiny_pipeline()
    halved.load_lora_weights(folder)
    halved.set_adapters("default_0", 0.5)
    half = generate(halved)
    older = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for key, value in state.items()}
    MedVolumePipeline.save_lora_weights(tmp_path / "bare", layers)
    for source in (state, older, tmp_path / "bare"):
        pipe = tiny_pipeline()
        caplog.clear()
        pipe.load_lora_weights(source)
        close(generate(pipe), half)
        assert "alpha, which is taken to be its rank" in caplog.text
    assert "does not say which U-Net" in caplog.text
    with pytest.raises(ValueError, match=r"the dict: is not a LoRA .*names begin with unet\."):
        pipe.load_lora_weights(layers)
    with pytest.raises(ValueError, match="the LoRA: is a LoRA of another U-Net: 1 of its layers"):
        pipe.load_lora_weights({key: state[key] for key in state if "down_blocks.0.0.conv1.lora_A" in key})


def test_what_is_saved_is_one_lora_and_no_pickle(saved, tmp_path):
    pipe = tiny_pipeline()
    for call, message in (
        (lambda: MedVolumePipeline.save_lora_weights(tmp_path), "give unet_lora_layers, or call .* on a pipeline"),
        (lambda: pipe.save_lora_weights(tmp_path), r"adapter_name is one of \[\]"),
        (lambda: pipe.save_lora_weights(tmp_path, adapter_name="look"), "no LoRA 'look' is attached"),
        (lambda: pipe.save_lora_weights(tmp_path, {}, safe_serialization=False), "saved as safetensors"),
        (lambda: pipe.save_lora_weights(tmp_path, save_function=torch.save), "saved as safetensors"),
        (lambda: pipe.save_lora_weights(tmp_path, {"conv_in.weight": torch.ones(1)}), "tensors that do not belong"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    pipe.load_lora_weights(saved[0])
    assert pipe.save_lora_weights(tmp_path, is_main_process=False) == tmp_path / FILE and not [*tmp_path.iterdir()]


def test_a_loras_name_is_of_its_file_whatever_its_type(saved, tmp_path):
    """Loaded in float32 or half, cast after or before: one name. Changed in place: another."""
    tiny_pipeline().save_pretrained(tmp_path)
    names = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        first, second = (
            MedVolumePipeline.from_pretrained(tmp_path),
            MedVolumePipeline.from_pretrained(tmp_path, dtype=dtype),
        )
        for pipe in (first, second):
            pipe.load_lora_weights(saved[0], adapter_name="look")
        names += [first.to(dtype).model_hash, second.model_hash]
    assert len(set(names)) == 1 and names[0] != MedVolumePipeline.from_pretrained(tmp_path).model_hash
    with torch.no_grad():
        next(value for name, value in first.unet.named_parameters() if "lora_B" in name).mul_(2)
    assert first.model_hash != names[0]


def test_of_several_loras_in_a_folder_the_usual_one_is_read(saved, tmp_path):
    for name in ("b.safetensors", "c.safetensors"):
        shutil.copy(saved[0] / FILE, tmp_path / name)
    with pytest.raises(ValueError, match="holds several LoRAs, b.safetensors, c.safetensors; give the file of one"):
        read_model(tmp_path)
    (tmp_path / "b.safetensors").write_text("damaged")
    shutil.copy(saved[0] / FILE, tmp_path)
    assert read_model(tmp_path) == read_model(saved[0])


def test_names_and_scales_of_loras_are_checked(saved, tmp_path):
    pipe = tiny_pipeline()
    for name in ("a.b", "", 3):
        with pytest.raises(ValueError, match="adapter_name is a text without dots"):
            pipe.load_lora_weights(saved[0], adapter_name=name)
    pipe.load_lora_weights(saved[0], adapter_name="look")
    for scale in (float("nan"), "x", [float("inf")], {"mid": None, "up": "x"}):
        with pytest.raises(ValueError, match="adapter_weights is a finite number"):
            pipe.set_adapters("look", scale)
    with pytest.raises(ValueError, match="no LoRA 'lok' is attached"):
        pipe.delete_adapters("lok")
    with pytest.raises(ValueError, match="unet_lora_layers is a state dict or a module; got int"):
        pipe.save_lora_weights(tmp_path, 3)
    with pytest.raises(TypeError, match="nonsense; it takes .*subfolder.*weight_name"):
        pipe.load_lora_weights(saved[0], nonsense=1)
    assert pipe.get_active_adapters() == ["look"]


def test_a_lora_is_swapped_for_another_in_its_place(saved, tmp_path):
    """Of another rank too; what has other layers leaves the first as it was."""
    trained_lora(tmp_path / "other", seed=1, rank=6)
    pipe, other = tiny_pipeline(), tiny_pipeline()
    other.load_lora_weights(tmp_path / "other")
    pipe.load_lora_weights(saved[0], adapter_name="look")
    few = {key: value for key, value in pipe.lora_state_dict(saved[0]).items() if "qkv" in key}
    for name, source, message in (
        ("look", few, "changes 11 layers, the new one 1, not the same"),
        ("new", saved[0], r"no LoRA 'new' is attached; adapter_name is one of \['look'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source, adapter_name=name, hotswap=True)
    with pytest.raises(ValueError, match="a LoRA 'look' is attached already"):
        pipe.load_lora_weights(saved[0], adapter_name="look")
    assert torch.equal(generate(pipe), saved[2])
    pipe.unet.lora_subjects = {"look": [{"salt": "of the first"}]}
    pipe.load_lora_weights(tmp_path / "other", adapter_name="look", hotswap=True)
    assert pipe.unet.lora_subjects == {"look": None}  # its file has no record
    close(generate(pipe), generate(other))
    for names in (["lok"], "look"):  # peft would fuse nothing, and say nothing
        with pytest.raises(ValueError, match="fuse_lora: no LoRA 'lok' is attached|adapter_names is a list"):
            pipe.fuse_lora(adapter_names=names)
    assert pipe.model_hash == other.model_hash
    assert pipe.get_active_adapters() == ["look"]


def test_a_fused_lora_is_known_to_all_pipelines_of_the_unet(saved):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(saved[0])
    shared = MedVolumePipeline.from_pipe(pipe)
    pipe.fuse_lora()
    assert shared.fused_loras == {"default_0"} and shared.num_fused_loras == 1
    with pytest.raises(ValueError, match="are fused into the weights; unfuse_lora"):
        shared.load_lora_weights(saved[0])
    shared.unfuse_lora()
    assert not pipe.num_fused_loras
    close(generate(pipe), saved[2])


def test_another_base_warns(saved, caplog):
    pipe = tiny_pipeline(seed=3)
    with caplog.at_level("WARNING"):
        pipe.load_lora_weights(saved[0])
    assert "was trained on another U-Net of this architecture" in caplog.text
    caplog.clear()
    tiny_pipeline().load_lora_weights(saved[0])
    assert "another U-Net" not in caplog.text


def test_files_that_do_not_fit_are_refused(saved, tmp_path):
    folder, expected, _ = saved
    tensors, header = load_file(folder / FILE), None
    with safe_open(folder / FILE, framework="pt") as file:
        header = file.metadata()

    def variant(name, tensors, metadata=header) -> Path:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / FILE, metadata=metadata)
        return tmp_path / name

    def without(key):
        return {k: v for k, v in tensors.items() if k != key}

    a, b = (f"unet.down_blocks.0.0.conv1.lora_{factor}.weight" for factor in "AB")
    deeper = {key.replace("down_blocks.1", "down_blocks.2"): value for key, value in tensors.items()}
    wider = {key: torch.cat([value, value], 1) if key.endswith("A.weight") else value for key, value in tensors.items()}
    pipe = tiny_pipeline()
    for source, message in (
        (
            variant("deeper", deeper),
            r"LoRA of another U-Net: 5 of its layers do not fit this one \(down_blocks.2.0.att",
        ),
        (variant("wider", wider), "LoRA of another U-Net: 11 of its layers"),
        (variant("half", without(b)), r"1 of its layers do not fit this one \(down_blocks.0.0.conv1\)"),
        (variant("other", {**without(a), "unet.conv_in.weight": tensors[a]}), "tensors that do not belong: .*conv_in"),
        (
            variant("part", tensors, {"lora_adapter_metadata": '{"unet.r": 4}'}),
            "its settings lack lora_alpha, target_modules",
        ),
        (tmp_path / "nowhere", "nowhere: no such folder"),
        ("user/nowhere", "user/nowhere: is neither a folder here nor found on the Hub"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source)
    torch.save(tensors, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="is not a LoRA in safetensors.*pickles are not read"):
        pipe.load_lora_weights(tmp_path / "lora.bin")
    assert torch.equal(generate(pipe), expected)  # nothing was attached on the way


def test_names_that_are_no_layers_are_refused():
    for names in (["qkv", "query"], ["mix"], []):
        with pytest.raises(
            ValueError, match=r"target_modules .* are \['conv1', 'conv2', 'conv_in', 'conv_out', 'linear_1'"
        ):
            add_lora(tiny_pipeline().unet, rank=2, alpha=2, target_modules=names)


def test_without_peft_it_says_so(saved, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else original(name, *a))
    pipe = tiny_pipeline()
    for attempt in (
        lambda: pipe.load_lora_weights(saved[0]),
        lambda: add_lora(pipe.unet, rank=2, alpha=2, target_modules=["qkv"]),
    ):
        with pytest.raises(ValueError, match="LoRA needs peft, which is not installed"):
            attempt()


def test_with_casting_and_offloading(saved, tmp_path):
    folder, _, expected = saved
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    types = {name: p.dtype for name, p in pipe.unet.named_parameters()}
    assert types["down_blocks.0.0.conv1.base_layer.weight"] == torch.float8_e4m3fn
    assert types["down_blocks.0.0.conv1.lora_A.default_0.weight"] == torch.float32
    assert 0 < (generate(pipe) - expected).norm() / (expected - expected.mean()).norm() < 0.1
    for late in (pipe.fuse_lora, pipe.unload_lora_weights, lambda: pipe.load_lora_weights(folder)):
        with pytest.raises(ValueError, match="before enable_layerwise_casting"):
            late()

    pipe = tiny_pipeline()
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    pipe.load_lora_weights(folder)
    assert torch.equal(generate(pipe), expected)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder)
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **options)
    close(generate(pipe), expected)
    with pytest.raises(ValueError, match="before offloading to disk"):
        pipe.load_lora_weights(folder)
    pipe = tiny_pipeline()
    plain = pipe.unet
    pipe.unet = torch.compile(plain, backend="eager")  # which diffusers would pass over in silence
    for silent in (lambda: pipe.load_lora_weights(folder), pipe.disable_lora, lambda: pipe.set_adapters("default_0")):
        with pytest.raises(ValueError, match="before torch.compile"):
            silent()
    pipe.unet = plain
    pipe.load_lora_weights(folder)
    assert torch.equal(generate(pipe), expected)


# Training


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pipeline of the size that tests/training/test_resume.py trains."""
    folder = tmp_path_factory.mktemp("base")
    pipe = tiny_pipeline(labels={"0": "background", "1": "body", "2": "organ", "3": "lesion"}, num_labels=4)
    torch.manual_seed(0)
    unet = type(pipe.unet)(
        channels=(8, 16), blocks=(1, 1), head_dim=8, mask_width=4, num_labels=4, mask_stride=[4, 4, 4], strides=(2,)
    )
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    pipe.register_modules(unet=unet)
    pipe.save_pretrained(folder)
    return folder


def train(output: Path, base: Path, *args: str):
    inputs = [f"--vae={base / 'vae'}", f"--init_from={base / 'unet'}"]
    return run(train_ldm, output, *inputs, "--lora={rank: 12, alpha: 6}", "--optimizer.learning_rate=1e-2", *args)


def test_training_ends_with_the_average_as_a_lora(tmp_path, base):
    train(tmp_path, base)
    assert {path.name for path in tmp_path.iterdir()} >= {"lora", "checkpoints", "config.yaml", "metrics.json"}
    assert not (tmp_path / "pipeline").exists() and [path.name for path in (tmp_path / "lora").iterdir()] == [FILE]
    average = load_file(tmp_path / "checkpoints/step_000009/unet_ema.safetensors")
    original = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    for key, tensor in average.items():  # all but the LoRA is the base, bit for bit
        if ".lora_" not in key:
            assert torch.equal(tensor, original[key.replace(".base_layer.", ".")]), key
    stored = load_file(tmp_path / "lora" / FILE)
    assert stored.keys() == {f"unet.{k.replace('.default.', '.')}" for k in average if ".lora_" in k}
    assert all(tensor.any() for tensor in stored.values())  # the second factors began at zero

    pipe = MedVolumePipeline.from_pretrained(base)
    expected = type(pipe.unet).from_pretrained(base / "unet")
    pipe.load_lora_weights(tmp_path / "lora")
    add_lora(expected, rank=12, alpha=6, target_modules=TARGETS)
    expected.load_state_dict(average)
    x, mask = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 4, 4, 4, 4)
    with torch.no_grad():
        wanted = expected.eval()(x, 500, mask).sample
        torch.testing.assert_close(pipe.unet(x, 500, mask).sample, wanted, atol=1e-6, rtol=1e-5)
        pipe.set_adapters("default_0", 0.0)
        assert (pipe.unet(x, 500, mask).sample - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("algorithm", [pytest.param("muon", marks=pytest.mark.slow), "adamw"])
def test_a_resumed_lora_equals_an_uninterrupted_one(algorithm, tmp_path, base, monkeypatch):
    args = [f"--optimizer.algorithm={algorithm}", "--lora.dropout=0.1", "--loop.max_steps=4"]
    train(tmp_path / "whole", base, *args)
    original, calls = LdmTrainingStep.__call__, []

    def interrupted(self, batch, generator):
        calls.append(1)
        if len(calls) == 8:  # after the checkpoint of step 3
            raise Interrupted
        return original(self, batch, generator)

    monkeypatch.setattr(LdmTrainingStep, "__call__", interrupted)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", base, *args)
    monkeypatch.setattr(LdmTrainingStep, "__call__", original)
    torch.manual_seed(99)
    train(tmp_path / "parts", base, *args, "--resume=latest")
    whole, parts = (tmp_path / part / "checkpoints/step_000004" for part in ("whole", "parts"))
    if algorithm == "muon":  # `everything` expects the states of both algorithms
        expected, got = everything(whole), everything(parts)
        assert expected.keys() == got.keys()
        assert [key for key in expected if not torch.equal(expected[key], got[key])] == []
    assert contents(tmp_path / "whole/lora" / FILE) == contents(tmp_path / "parts/lora" / FILE)


def test_a_base_that_is_stored_in_half_precision_is_known_again(tmp_path, base):
    """Training computes in float32 what weights/hippocampus stores in float16; the LoRA's file must name the latter."""
    MedVolumePipeline.from_pretrained(base, dtype=torch.float16).save_pretrained(tmp_path)
    pipe = MedVolumePipeline.from_pretrained(tmp_path)
    unet = type(pipe.unet).from_config(pipe.unet.config)
    initialize_from(unet, tmp_path / "unet")
    data = DataConfig(phantom=PhantomConfig())
    config = TrainLdmConfig("run", "vae", data, model={}, init_from=str(tmp_path / "unet"), lora=LoraConfig())
    assert attach_lora(unet, config) == pipe.unet_hash


def test_what_a_lora_cannot_start_from(tmp_path, base):
    with pytest.raises(ValueError, match="lora needs --init_from"):
        run(train_ldm, tmp_path / "a", f"--vae={base / 'vae'}", "--lora={}")
    with pytest.raises(ValueError, match="differs from .*: objective is v_prediction, not rectified_flow"):
        train(tmp_path / "b", base, "--model.objective=v_prediction")
    with pytest.raises(ValueError, match="target_modules"):
        train(tmp_path / "c", base, "--lora.target_modules=[query]")
    with pytest.raises(ValueError, match="residual_noise: a LoRA uses that"):
        train(tmp_path / "d", base, "--residual_noise=true")


def test_the_recipe_fits_the_weights_that_ship():
    config = parse_config(TrainLdmConfig, ["--config", str(ROOT / "configs/hippocampus/lora.yaml")])
    assert config.lora is not None and config.lora.rank == 16
    stored = json.loads((Path(config.init_from) / "config.json").read_text())
    for name, value in config.model.items():
        assert name == "class" or stored[name] == value
    parent = yaml.safe_load((ROOT / "configs/hippocampus/ldm.yaml").read_text())
    own = yaml.safe_load((ROOT / "configs/hippocampus/lora.yaml").read_text())
    assert all(own[section] == parent[section] for section in ("data", "model", "cache"))
