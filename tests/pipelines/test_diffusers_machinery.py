"""diffusers' own machinery on our models: attention backends, checkpointing, casting, offloading, the Hub, shards."""

import json
import shutil

import diffusers.models.attention_dispatch as dispatch
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from fake_hub import fake_hub
from generating import generate
from safetensors.torch import load_file
from tiny import tiny_pipeline
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from autoencoder import AutoencoderKL3D, SpaceToDepth3D
from autoencoder.layers import ResidualBlock
from diffusion import LatentUNet3D
from diffusion.attention import SelfAttention
from diffusion.unet import TimeResidualBlock
from pipelines import MedVolumePipeline, SamplingConfig, VolumeRequest

CPU = torch.device("cpu")


def weight_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# Attention


def random_attention(channels: int = 16, head_dim: int = 8) -> SelfAttention:
    attention = SelfAttention(channels, head_dim).requires_grad_(False)
    torch.nn.init.normal_(attention.out.weight, std=0.5)
    return attention


def test_backends_agree_and_the_chosen_one_runs(monkeypatch):
    pipe, used = tiny_pipeline(), []
    expected = generate(pipe)
    for name in ("native", "_native_flash", "_native_math"):
        original = dispatch._AttentionBackendRegistry._backends[name]
        monkeypatch.setitem(
            dispatch._AttentionBackendRegistry._backends,
            dispatch.AttentionBackendName(name),
            lambda *args, original=original, name=name, **kwargs: used.append(name) or original(*args, **kwargs),
        )
        used.clear()
        pipe.unet.set_attention_backend(name)
        torch.testing.assert_close(generate(pipe), expected, atol=2e-3, rtol=1e-5)
        assert used == [name] * 2  # two steps, one attention
    pipe.unet.reset_attention_backend()
    used.clear()
    with dispatch.attention_backend("_native_math"):
        generate(pipe)
    assert used == ["_native_math"] * 2


def test_a_backend_is_set_for_one_model_alone():
    first, second = tiny_pipeline(), tiny_pipeline()
    before = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    first.unet.set_attention_backend("_native_math")
    assert dispatch._AttentionBackendRegistry.get_active_backend()[0] == before
    chosen = [next(iter(pipe.unet.attn_processors.values()))._attention_backend for pipe in (first, second)]
    assert chosen == ["_native_math", None]


def test_unavailable_attention_backends_are_refused_early(monkeypatch):
    """Before anything runs."""
    monkeypatch.setattr(dispatch, "_CAN_USE_XFORMERS_ATTN", True)  # as if it were installed
    pipe, called = tiny_pipeline(), []
    monkeypatch.setattr(pipe.unet, "embed_mask", lambda ids: called.append(1))
    line = (
        "the {} attention backend needs a CUDA device: move the model to one, or set_attention_backend\\('native'\\)$"
    )
    for name in ("xformers", "_native_cudnn", "_native_efficient"):
        pipe.unet.set_attention_backend(name)  # the model may still move to a GPU
        with pytest.raises(ValueError, match=line.format(name)):
            generate(pipe)
        with pytest.raises(ValueError, match=line.format(name)):
            pipe.unet(torch.randn(1, 4, 3, 3, 3), 1, torch.zeros(1, 8, 3, 3, 3))
    pipe.unet.reset_attention_backend()
    with dispatch.attention_backend("xformers"), pytest.raises(ValueError, match=line.format("xformers")):
        generate(pipe)
    assert not called


def test_backends_that_are_not_there_are_named():
    unet = tiny_pipeline().unet
    for name, message in (("flash", "flash-attn.*Or use 'native'"), ("fast", "must be one of")):
        with pytest.raises(ValueError, match=message):
            unet.set_attention_backend(name)


def test_attention_over_many_cells_never_holds_all_pairs():
    """8,000 cells: all pairs would be 64 million numbers; math attention, which holds them, shows that they are
    seen."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in (result if isinstance(result, tuple) else [result]) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in tensors)])
            return result

    attention = random_attention()
    with torch.no_grad():
        with Largest() as seen:
            attention(torch.randn(1, 16, 20, 20, 20))
        assert seen.numel == 3 * 16 * 20**3  # queries, keys and values
        with dispatch.attention_backend("_native_math"), Largest() as seen:
            attention(torch.randn(1, 16, 10, 10, 10))
        assert seen.numel >= 1000**2


# Memory in training


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_checkpointing_saves_memory_and_keeps_gradients(name):
    """It keeps fewer activations and gives the same gradients."""
    torch.manual_seed(0)
    if name == "unet":
        model = LatentUNet3D(channels=(16, 32), blocks=(2, 3), head_dim=8)
        torch.nn.init.normal_(model.conv_out.weight, std=0.1)
        inputs = (torch.randn(1, 4, 8, 8, 8), 300)
    else:
        model = AutoencoderKL3D(channels=(8, 16), encoder_blocks=(2, 2), decoder_blocks=(2, 3))
        inputs = (torch.randn(1, 1, 24, 24, 24),)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def measure() -> tuple[int, list[torch.Tensor]]:
        kept: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.zero_grad()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.train()(*inputs, return_dict=False)[0].square().mean()
        loss.backward()
        return sum(kept.values()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain_bytes, plain = measure()
    model.enable_gradient_checkpointing()
    fewer_bytes, again = measure()
    assert fewer_bytes < 0.5 * plain_bytes
    assert len(plain) == len(again) > 20
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)


# Compilation


def test_the_repeated_blocks_are_compiled_and_give_the_same(tmp_path):
    """Every residual block of U-Net and autoencoder, each by itself; also where a volume is coded in slabs."""
    expected, pipe, compiled = generate(tiny_pipeline()), tiny_pipeline(), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    for model, block in ((pipe.unet, TimeResidualBlock), (pipe.vae, ResidualBlock)):
        model.compile_repeated_blocks(backend=backend)
        blocks = [module for module in model.modules() if isinstance(module, block)]
        assert blocks and all(module._compiled_call_impl is not None for module in blocks)
    torch.testing.assert_close(generate(pipe), expected, atol=2e-3, rtol=1e-5)
    assert compiled
    pipe.vae.enable_tiling(slab_bytes=1)
    torch.testing.assert_close(generate(pipe), expected, atol=2e-3, rtol=1e-5)
    pipe.save_pretrained(tmp_path)
    assert MedVolumePipeline.from_pretrained(tmp_path).model_hash == pipe.model_hash
    with pytest.raises(ValueError, match="not found in the model"):
        SpaceToDepth3D().compile_repeated_blocks()


# Weights stored in eight bits


def test_layerwise_casting_stores_float8_and_computes_float32():
    expected = generate(tiny_pipeline())
    pipe = tiny_pipeline()
    before = {name: weight_bytes(getattr(pipe, name)) for name in ("unet", "vae")}
    for model in (pipe.unet, pipe.vae):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert all(weight_bytes(getattr(pipe, name)) < 0.4 * before[name] for name in before)
    types = {name: p.dtype for name, p in pipe.unet.named_parameters()}
    assert types["down_blocks.0.0.conv1.weight"] == types["down_blocks.1.0.attention.qkv.weight"] == torch.float8_e4m3fn
    kept = [name for name in types if "norm" in name or name.split(".")[0] in ("conv_in", "conv_out", "mask_embedding")]
    assert len(kept) >= 10 and all(types[name] == torch.float32 for name in kept)
    first = generate(pipe)
    error = (first - expected).norm() / (expected - expected.mean()).norm()
    assert 1e-4 < error < 0.1  # three bits of mantissa: 3 % a weight
    assert torch.equal(generate(pipe), first) and pipe.vae.decoder[0].weight.dtype == torch.float8_e4m3fn


def test_the_record_tells_what_was_cast(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    for change, expected in (
        (lambda pipe: None, "float32"),
        (lambda pipe: pipe.vae.to(torch.bfloat16), "bfloat16 float32"),
        (lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "float32 float8_e4m3fn"),
    ):
        pipe = MedVolumePipeline.from_pretrained(tmp_path)
        change(pipe)
        assert pipe.record(VolumeRequest(), SamplingConfig()).dtype == expected


# Offloading. On a CPU the weights have nowhere else to go but the disk, where a hook that does not fire leaves garbage.


def onto_disk(pipe, kind, folder):
    options = {"offload_type": kind, "num_blocks_per_group": 1, "offload_to_disk_path": str(folder)}
    pipe.enable_group_offload(onload_device=CPU, **options)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_changes_nothing(kind, tmp_path):
    expected = generate(tiny_pipeline())
    pipe = tiny_pipeline()
    pipe.enable_group_offload(onload_device=CPU, offload_type=kind, num_blocks_per_group=1)
    assert torch.equal(generate(pipe), expected)

    pipe = tiny_pipeline()
    onto_disk(pipe, kind, tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) > 5
    for parameter in (p for model in (pipe.unet, pipe.vae) for p in model.parameters()):
        parameter.data.fill_(float("nan"))  # whatever is not read from the disk shows
    for _ in range(2):  # to rounding: the weights have lost their memory format
        torch.testing.assert_close(generate(pipe), expected, atol=2e-3, rtol=1e-5)
    assert pipe.model_hash == tiny_pipeline().model_hash


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_of_an_encoder(kind, tmp_path):
    vae, x = tiny_pipeline().vae, torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mean
        options = {"offload_type": kind, "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
        vae.enable_group_offload(CPU, **options)
        for parameter in vae.parameters():
            parameter.data.fill_(float("nan"))
        torch.testing.assert_close(vae.encode(x).latent_dist.mean, expected, atol=1e-5, rtol=1e-4)


def test_what_lies_on_disk_from_elsewhere_is_not_loaded(tmp_path):
    onto_disk(tiny_pipeline(), "block_level", tmp_path)
    with pytest.raises(ValueError, match="holds offloaded weights already; give an empty folder"):
        onto_disk(tiny_pipeline(seed=1), "block_level", tmp_path)


def test_model_offload_fires_for_encode_decode_and_the_mask(monkeypatch):
    expected = generate(tiny_pipeline())
    pipe, fired, original = tiny_pipeline(), [], CpuOffload.pre_forward

    def pre_forward(self, module, *args, **kwargs):
        fired.append(type(module).__name__)
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), expected)
    assert fired == ["LatentUNet3D"] * 3 + ["AutoencoderKL3D"]  # embed_mask, two steps, decode
    pipe.vae.encode(torch.zeros(1, 1, 4, 4, 4))
    assert fired[4:] == ["AutoencoderKL3D"]


def test_sequential_offload_leaves_nothing_behind():
    """Accelerate's own function: diffusers' method makes "cpu:0" of "cpu", which Accelerate cannot handle."""
    expected = generate(tiny_pipeline())
    pipe = tiny_pipeline()
    _ = pipe.model_hash
    for model in (pipe.unet, pipe.vae):
        cpu_offload(model, CPU)
        assert all(p.is_meta for p in model.parameters())
    assert torch.equal(generate(pipe), expected)
    assert all(p.is_meta for p in pipe.unet.parameters())


def test_weights_out_of_reach_are_never_hashed(tmp_path):
    for offload in (
        lambda unet: cpu_offload(unet, CPU),
        lambda unet: unet.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)),
    ):
        pipe = tiny_pipeline()
        offload(pipe.unet)
        with pytest.raises(ValueError, match="offloaded, so the model's hash cannot be computed"):
            generate(pipe)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_offloading_without_an_accelerator_is_one_line():
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(RuntimeError, match=f"^`{method}` requires accelerator, but not found$"):
            getattr(tiny_pipeline(), method)()


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in a folder: repository -> the folder of what it holds."""
    return fake_hub(tmp_path / "hub", monkeypatch)


def check_pushed(folder, expected: set[str]):
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert files.keys() == expected | {"README.md"}
    for name, path in files.items():
        if not name.endswith(".safetensors"):
            text = path.read_text()
            assert "_name_or_path" not in text and str(folder.parents[3]) not in text, name


PIPELINE = {"model_index.json", "scheduler/scheduler_config.json"} | {
    f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", "diffusion_pytorch_model.safetensors")
}


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_pushed_pipeline_comes_back(hub, tmp_path, way):
    tiny_pipeline().save_pretrained(tmp_path / "local")
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "local")  # it has a path that could leak
    pipe.set_progress_bar_config(disable=True)
    if way == "push_to_hub":
        pipe.push_to_hub("user/tiny")
    else:
        pipe.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="user/tiny")
    check_pushed(hub("user/tiny"), PIPELINE)
    loaded = MedVolumePipeline.from_pretrained("user/tiny", cache_dir=tmp_path / "hub")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.model_hash == pipe.model_hash
    assert torch.equal(generate(loaded), generate(pipe))
    with pytest.raises(ValueError, match="nor found on the Hub"):
        MedVolumePipeline.from_pretrained("user/absent", cache_dir=tmp_path / "hub")


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_a_pushed_model_comes_back(hub, tmp_path, name):
    tiny_pipeline().save_pretrained(tmp_path / "local")
    model = getattr(MedVolumePipeline.from_pretrained(tmp_path / "local"), name)
    model.push_to_hub(f"user/{name}")
    check_pushed(hub(f"user/{name}"), {"config.json", "diffusion_pytorch_model.safetensors"})
    loaded = type(model).from_pretrained(f"user/{name}", cache_dir=tmp_path / "hub")
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with pytest.raises(ValueError, match="safe_serialization=False is refused"):
        model.push_to_hub("user/other", safe_serialization=False)


# Shards and variants


@pytest.fixture(params=[None, "fp16"])
def sharded(request, tmp_path):
    """A pipeline folder with shards of 20 KB; with a variant, unsharded weights of another model lie beside them."""
    if request.param:
        tiny_pipeline(seed=1).save_pretrained(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="20KB", variant=request.param)
    return tmp_path, request.param


def test_shards_and_variants_hold_the_same_model(sharded):
    folder, variant = sharded
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 5
    expected = tiny_pipeline()
    loaded = MedVolumePipeline.from_pretrained(folder, variant=variant)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), generate(expected), atol=2e-3, rtol=1e-5)
    assert loaded.model_hash == expected.model_hash
    for name, model_class in (("unet", LatentUNet3D), ("vae", AutoencoderKL3D)):
        wanted = getattr(expected, name).state_dict()
        for model in (
            model_class.from_pretrained(folder / name, variant=variant),
            model_class.from_pretrained(folder, subfolder=name, variant=variant),
        ):
            assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


def spoil(what, folder, index):
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    if what == "missing":
        shards[0].unlink()
    elif what == "swapped":
        one, other = shards[0].read_bytes(), shards[1].read_bytes()
        shards[0].write_bytes(other)
        shards[1].write_bytes(one)
    elif what == "outside":
        shutil.move(shards[0], folder / shards[0].name)
        text = index.read_text()
        index.write_text(text.replace(shards[0].name, f"../{shards[0].name}"))
    elif what == "unlisted":
        content = json.loads(index.read_text())
        content["weight_map"].pop(next(iter(load_file(shards[0]))))
        index.write_text(json.dumps(content))
    else:
        index.write_text(json.dumps({"weight_map": ["conv_in.weight"]}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "truncated or corrupt safetensors file"),
        ("swapped", "holds other tensors than the index says"),
        ("outside", "names files outside of its folder"),
        ("unlisted", "holds other tensors than the index says"),
        ("damaged", "is not an index of shards"),
    ],
)
def test_broken_shards_are_named(sharded, what, message):
    folder, variant = sharded
    spoil(what, folder, next((folder / "unet").glob("*.index*.json")))
    with pytest.raises(ValueError, match=f"{folder}/unet/.*{message}"):
        MedVolumePipeline.from_pretrained(folder, variant=variant)
    with pytest.raises(ValueError, match=f"{folder}/unet/.*{message}"):
        LatentUNet3D.from_pretrained(folder / "unet", variant=variant)
