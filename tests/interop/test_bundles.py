"""Bundles of MONAI's model zoo, converted, generate what their scripts generate; what else they say is refused."""

import copy
import json
import shutil

import bundles
import numpy as np
import pytest
import torch
from bundles import BRAIN, BRATS, NUMBERS
from monai.networks.schedulers.ddim import DDIMScheduler
from safetensors.torch import load_file

from convert import main as command
from diffusion import MonaiUNet3D
from generate import main as generate
from interop.bundle_reader import BundleOptions, read_bundle
from interop.convert import convert
from interop.formats import FORMATS
from interop.networks import PEERS, config_of, expected_shapes
from pipelines import MedVolumePipeline, read_sidecar

KIND = "monai-bundle"
AGES = {"gender": 1.0, "age": 0.7, "ventricular_vol": 0.3, "brain_vol": 0.5}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Returns a function that writes a narrow bundle, once, and gives its folder with an unchanged config, and MONAI's
    networks."""
    root, made = tmp_path_factory.mktemp("zoo"), {}

    def get(name: str):
        if name not in made:
            made[name] = bundles.write_bundle(root / name, name)
        return bundles.write_config(root / name, name, bundles.narrow_config(name)), *made[name]

    return get


def changed(folder, name: str, change):
    """Write the config of a bundle with a change."""
    config = bundles.narrow_config(name)
    change(config)
    return bundles.write_config(folder, name, config)


def assert_close(ours, theirs) -> None:
    ours, theirs = torch.as_tensor(ours).float(), torch.as_tensor(theirs).float()
    assert theirs.std() > 1e-3 and ours.numel() == theirs.numel()
    assert (ours.reshape(theirs.shape) - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


@torch.no_grad()
def zoo_sample(vae, unet, noise, beta_end: float, conditioning=None):
    """What `scripts/ldm_sampler.py` and `scripts/sampler.py` do: the latents, and the image.

    At the timesteps of the MONAI that the bundles name, 1.4.0. Since 1.6 (MONAI#8623) they are 999, 888, 777, ..., but
    a step still leads to 100 timesteps less.
    """
    scheduler = DDIMScheduler(1000, "scaled_linear_beta", clip_sample=False, beta_start=0.0015, beta_end=beta_end)
    scheduler.set_timesteps(num_inference_steps=10)
    scheduler.timesteps = torch.arange(900, -1, -100)
    constant = None
    if conditioning is not None:
        constant = conditioning.squeeze(1)[..., None, None, None].expand(-1, -1, *noise.shape[2:])
    for t in scheduler.timesteps:
        given = noise if constant is None else torch.cat((noise, constant), dim=1)
        predicted = unet(given, timesteps=torch.Tensor((t,)).long(), context=conditioning)
        noise, _ = scheduler.step(predicted, t, noise)
    return noise, vae.decode_stage_2_outputs(noise)


def of_generative(config) -> None:
    """Make the config of a bundle one of MONAI Generative, before MONAI 1.4."""
    for entry, name in (("autoencoder_def", "AutoencoderKL"), ("network_def", "DiffusionModelUNet")):
        config[entry]["_target_"] = f"generative.networks.nets.{name}"
        config[entry]["num_channels"] = config[entry].pop("channels")
        del config[entry]["include_fc"]
    del config["network_def"]["use_combined_linear"]
    config["noise_scheduler"]["_target_"] = "generative.networks.schedulers.DDIMScheduler"
    config["noise_scheduler"]["beta_schedule"] = "scaled_linear"
    del config["noise_scheduler"]["schedule"]


def of_an_older_revision(config) -> None:
    """Make the config of the BraTS bundle one with four latent channels."""
    of_generative(config)
    config |= {"latent_channels": 4, "latent_shape": ["@latent_channels", 48, 48, 32]}
    config["network_def"] |= {"num_channels": [128, 256, 512], "num_head_channels": [0, 32, 32]}


@pytest.mark.parametrize(
    ("name", "change", "shape", "spacing", "counts"),
    [
        (BRATS, None, (144, 176, 112), 1.1, [(130, 21_000_353), (296, 189_325_576)]),
        (BRATS, of_an_older_revision, (192, 192, 128), 1.1, [(130, 20_944_897), (298, 164_593_924)]),
        (BRAIN, None, (160, 224, 160), 1.0, [(162, 13_766_248), (528, 553_168_899)]),
    ],
    ids=["brats", "brats-older", "brain"],
)
def test_published_bundles_at_full_width(name, change, shape, spacing, counts, tmp_path):
    """Tensors and parameters of MONAI's classes (on the meta device), by the zoo's own configs."""
    config = copy.deepcopy(bundles.CONFIGS[name])
    if change is not None:
        change(config)
    bundles.write_config(tmp_path, name, config)
    (tmp_path / "models").mkdir()
    for file in bundles.FILES[name]:
        (tmp_path / "models" / file).touch()
    kind, value_range = read_bundle(FORMATS[KIND], tmp_path, BundleOptions(), None)
    assert (kind.variant.shape, kind.variant.spacing, kind.variant.steps) == (shape, (spacing,) * 3, 50)
    assert value_range == (0.0, 1.0)
    for part, wanted in zip(kind.parts, counts, strict=True):
        peer = PEERS[part.peers[0]]
        expected = expected_shapes(peer, config_of(peer, part.arguments) | dict(part.settings))
        assert (len(expected), sum(int(np.prod(sides)) for sides in expected.values())) == wanted


@pytest.mark.parametrize("name", [BRATS, BRAIN])
def test_a_bundle_generates_what_it_generated(name, zoo, tmp_path):
    folder, vae, unet = zoo(name)
    convert(KIND, folder, tmp_path / "out")
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)

    stored = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    theirs = {f"network.{key}": value for key, value in unet.state_dict().items()}
    assert stored.keys() == theirs.keys() and all(torch.equal(stored[key], value) for key, value in theirs.items())

    voxels = torch.rand(1, 1, 16, 24, 8)
    with torch.no_grad():
        posterior = pipe.vae.encode(voxels * 2 - 1).latent_dist
        for ours, expected in zip((posterior.raw_mean, posterior.std), vae.encode(voxels), strict=True):
            assert_close(ours, expected)
        noise = torch.randn(1, *posterior.mean.shape[1:])
        assert_close((pipe.vae.decode(noise).sample + 1) / 2, vae.decode(noise))

    channels = pipe.vae.config["latent_channels"]
    noise = torch.randn(1, channels, 4, 8, 4, generator=torch.Generator().manual_seed(3))
    values, conditioning, own = {}, None, None
    if name == BRAIN:
        values, conditioning = {"numbers": AGES}, torch.tensor([[[AGES[name] for name in NUMBERS]]])
        own = torch.tensor([[AGES[name] for name in sorted(NUMBERS)]])
    with torch.no_grad():
        given = noise
        if conditioning is not None:
            given = torch.cat([noise, conditioning.view(1, 4, 1, 1, 1).expand(1, 4, 4, 8, 4)], dim=1)
        predicted = unet(given, torch.tensor([437]), context=conditioning)
        assert_close(pipe.unet(noise, torch.tensor([437]), numbers=own).sample, predicted)

    latents, image = zoo_sample(vae, unet, noise, 0.0205 if name == BRAIN else 0.0195, conditioning)
    steps = []
    out = pipe(
        shape=pipe.data.shape_range[0],
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(tensors["latents"].clone()),
        **values,
    )
    assert len(steps) == 10
    assert_close(steps[-1], latents)
    [volume] = out.volumes
    assert_close(np.asarray(volume.dataobj), image.clamp(0, 1))
    assert volume.get_data_dtype() == np.float32
    assert np.allclose(volume.affine, np.diag([*[1.1 if name == BRATS else 1.0] * 3, 1.0]))


def test_a_config_of_monai_generative(zoo, tmp_path):
    """Its self-attention never used its last layer, which MONAI's class would use."""
    folder, _, unet = zoo(BRATS)
    converted = convert(KIND, changed(folder, BRATS, of_generative), tmp_path / "out")
    assert len(converted[1].dropped) == 14 and all(".proj_attn." in key for key in converted[1].dropped)
    ours = MonaiUNet3D.from_pretrained(tmp_path / "out/unet").eval()
    latents, timestep = torch.randn(1, 4, 4, 8, 4), torch.tensor([9])
    with torch.no_grad():
        assert_close(ours(latents, timestep).sample, unet(latents, timestep))


def test_what_is_not_recognized_is_asked_for(zoo, tmp_path):
    """One option after the other, each named by the message; then the folder has what was given."""

    def reword(config):
        config["noise"] = "$torch.randn(1, 3, 4, 8, 4)"
        config["set_timesteps"] = "$@scheduler.set_timesteps(25 * 2)"
        config["conditioning"] = "$make_conditioning()"

    folder = changed(zoo(BRAIN)[0], BRAIN, reword)
    (folder / "configs/metadata.json").unlink()
    given, asked = {}, []
    answers = {"--numbers": ("numbers", NUMBERS), "--shape": ("shape", (32, 64, 32)), "--steps": ("steps", 7)}
    answers["--spacing"] = ("spacing", (1.0, 2.0, 1.0))
    value_range = None
    while not (tmp_path / "out").exists():
        try:
            convert(KIND, folder, tmp_path / "out", value_range=value_range, bundle=BundleOptions(**given))
        except ValueError as error:
            [option] = [word for word in [*answers, "--value_range"] if word in str(error)]
            assert option not in asked and str(folder / "configs") in str(error)
            asked.append(option)
            if option == "--value_range":
                value_range = (-1.0, 3.0)
            else:
                given |= [answers[option]]
    assert sorted(asked) == sorted([*answers, "--value_range"])
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "out")
    assert pipe.sampling_settings.num_inference_steps == 7 and pipe.data.spacing == (1.0, 2.0, 1.0)
    assert pipe.data.shape_range[0] == (32, 64, 32) and pipe.data.intensity[0].low == -1.0
    assert pipe.unet.config["context_numbers"] == list(NUMBERS) and pipe.vae.config["value_range"] == [-1.0, 3.0]


def entry(name: str, key: str, value):
    """A change of one argument of a config."""
    return lambda config: config[name].__setitem__(key, value)


def top(name: str, value):
    """A change of one entry of a config."""
    return lambda config: config.__setitem__(name, value)


HOSTILE = [
    (
        top("saver", {"_target_": "os.system", "command": "true"}),
        r"saver\._target_ is 'os\.system', which is not known",
    ),
    (top("inferer", {"_target_": "scripts.evil.Sampler"}), r"inferer\._target_ is 'scripts\.evil\.Sampler'"),
    (top("extra", {"no": "target"}), r"extra\._target_ is None"),
    (top("extra", {"_target_": ["AutoencoderKL"]}), r"extra\._target_ is \['AutoencoderKL'\]"),
    (entry("autoencoder_def", "_target_", "evil.networks.nets.AutoencoderKL"), r"_target_ is 'evil\."),
    (entry("autoencoder_def", "_target_", "monai.networks.nets.UNet"), r"_target_ is 'monai\.networks\.nets\.UNet'"),
    (entry("network_def", "_target_", "monai.networks.nets.AutoencoderKL"), "one entry .* autoencoder; there is auto"),
    (lambda config: config.pop("network_def"), "diffusion U-Net; there is none"),
    (lambda config: config.pop("noise_scheduler"), "scheduler; there is none"),
    (entry("network_def", "channels", "$[8, 8, 16]"), r"network_def\.channels is '\$\[8, 8, 16\]': expressions"),
    (entry("network_def", "channels", [8, "$8", 16]), r"network_def\.channels is '\$8': expressions"),
    (entry("network_def", "channels", [8, 8.5, 16]), "channels"),
    (entry("network_def", "num_res_blocks", "$__import__('os').system('true')"), "expressions are never evaluated"),
    (entry("network_def", "num_res_blocks", "%configs/other.json#blocks"), "expressions are never evaluated"),
    (entry("network_def", "num_res_blocks", "@autoencoder_def#num_res_blocks"), "expressions are never evaluated"),
    (entry("network_def", "num_res_blocks", "@autoencoder_def"), "is an object; a plain value is expected"),
    (entry("network_def", "num_res_blocks", "@nowhere"), "refers to '@nowhere', which leads to no value"),
    (entry("network_def", "num_res_blocks", {"_target_": "len"}), "is an object"),
    (top("latent_channels", "@latent_channels"), "refers to '@latent_channels', which leads to no value"),
    (top("latent_channels", "$2 + 2"), r"is '\$2 \+ 2': expressions are never evaluated"),
    (top("latent_channels", "4"), r"autoencoder_def\.latent_channels is '4'; a whole number"),
    (top("spatial_dims", 2), "spatial_dims is 2; only 3"),
    (entry("network_def", "widths", [8]), "widths: not an argument"),
    (entry("network_def", "use_combined_linear", True), "use_combined_linear is True"),
    (entry("network_def", "channels", [8, 16]), "one entry per level"),
    (entry("network_def", "channels", [8, 8, 24]), "of another shape"),
    (entry("network_def", "in_channels", 5), "of another shape|takes 5 channels"),
    (entry("network_def", "in_channels", -1), "in_channels"),
    (entry("network_def", "num_res_blocks", 2), "missing"),
    (entry("noise_scheduler", "_target_", "monai.networks.schedulers.PNDMScheduler"), "which is not known"),
    (entry("noise_scheduler", "clip_sample", True), r"noise_scheduler\.clip_sample is True; only False"),
    (entry("noise_scheduler", "steps_offset", 1), "steps_offset is 1; only 0"),
    (entry("noise_scheduler", "beta_start", "$0.0015"), r"noise_scheduler\.beta_start is '\$0\.0015': expressions"),
    (entry("noise_scheduler", "beta_start", "0.0015"), r"beta_start is '0\.0015'; a number"),
    (entry("noise_scheduler", "beta_end", float("nan")), "beta_end"),
    (entry("noise_scheduler", "schedule", "sigmoid_beta"), "schedule is 'sigmoid_beta'; it is"),
    (entry("noise_scheduler", "prediction_type", "sample"), "prediction_type is 'sample'; it is"),
    (entry("noise_scheduler", "num_train_timesteps", 1e3), "train_steps"),
    (entry("noise_scheduler", "thresholding", True), r"noise_scheduler has 'thresholding'"),
    (top("load_diffusion_path", "$@model_dir + '/../../model.pt'"), "leads out of the bundle's folder"),
    (top("load_diffusion_path", "/etc/passwd"), "'/etc/passwd', which leads out of the bundle's folder"),
    (top("load_diffusion_path", "models\\..\\..\\model.pt"), "leads out of the bundle's folder"),
    (top("bundle_root", "/"), "leads out of the bundle's folder"),
    (top("bundle_root", ".."), "leads out of the bundle's folder"),
    (top("model_dir", "$@model_dir + '/models'"), r"load_diffusion_path is|model_dir is"),
    (
        top("load_diffusion_path", "$open('x').read()"),
        r"load_diffusion_path is .*write a path from the bundle's folder",
    ),
    (top("load_diffusion_path", 3), "load_diffusion_path is 3; write a path"),
    (top("load_diffusion_path", "models/other.pt"), "'models/other.pt', which is not there; download it"),
    (top("load_diffusion_path", "models"), "'models', which is not there"),
    (top("latent_shape", ["@latent_channels", 4, 8]), "--shape"),
    (top("latent_shape", ["@latent_channels", 4, 8, "$4"]), "expressions are never evaluated"),
    (top("latent_shape", [8, 4, 8, 4]), "not of 4 channels; give .*--shape"),
    (top("latent_shape", [4, 4, 8, 10**9]), "shape"),
    (top("set_timesteps", "$@other.set_timesteps(num_inference_steps=50)"), "--steps"),
    (top("set_timesteps", "$@noise_scheduler.set_timesteps(num_inference_steps=50); import os"), "--steps"),
    (top("set_timesteps", "$@noise_scheduler.set_timesteps(num_inference_steps=99999)"), "num_inference_steps"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_configs_that_are_refused(change, message, zoo, tmp_path):
    folder = changed(zoo(BRATS)[0], BRATS, change)
    with pytest.raises(ValueError, match=message) as caught:
        convert(KIND, folder, tmp_path / "out")
    assert str(folder) in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("diffusion_def", "cross_attention_dim", 5), "context_numbers .*cross_attention_dim, 5"),
        (entry("diffusion_def", "in_channels", 8), r"in_channels is 8; it is 3, the latents', or 7, with gender, age"),
        (entry("diffusion_def", "in_channels", 3), "of another shape"),
        (entry("diffusion_def", "with_conditioning", False), "belong together"),
        (top("conditioning", "$torch.tensor([[@age, @age, @age, @age]]).to(@device).unsqueeze(1)"), "different names"),
        (top("conditioning", "$torch.tensor([[@age]]).to(@device).unsqueeze(1); import os"), "--numbers"),
    ],
)
def test_conditionings_that_are_refused(change, message, zoo, tmp_path):
    folder = changed(zoo(BRAIN)[0], BRAIN, change)
    with pytest.raises(ValueError, match=message) as caught:
        convert(KIND, folder, tmp_path / "out")
    assert str(folder) in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "code", "swapped", "proj_attn"])
def test_weights_that_are_refused(change, zoo, tmp_path):
    folder, _, unet = zoo(BRATS)
    shutil.copytree(folder, tmp_path / "bundle")
    path = tmp_path / "bundle/models/model.pt"
    state = dict(unet.state_dict())
    if change == "missing":
        del state["time_embed.0.bias"]
        message = r"missing \(network\.time_embed\.0\.bias\)"
    elif change == "extra":
        state["time_embed.4.bias"], message = torch.zeros(8), r"unknown \(time_embed\.4\.bias\)"
    elif change == "code":
        state["run"], message = pytest.raises, "names "  # a function, which torch.save stores by its name
    elif change == "swapped":
        path, message = tmp_path / "bundle/models/model_autoencoder.pt", "model_autoencoder.pt: does not hold"
    else:  # of a layer that has none
        state["down_blocks.0.resnets.0.proj_attn.weight"], message = torch.zeros(8), "unknown"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message) as caught:
        convert(KIND, tmp_path / "bundle", tmp_path / "out")
    assert path.name in str(caught.value) and not (tmp_path / "out").exists()


def test_options_that_do_not_fit(zoo, tmp_path):
    brats, *_ = zoo(BRATS)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/inference.json").write_text("[]")
    for name, weights, options, message in (
        (
            "maisi-rflow-ct",
            brats,
            {"bundle": BundleOptions(steps=5, shape=(8, 8, 8))},
            "--shape, --steps belongs to --from monai-bundle",
        ),
        (KIND, brats, {"bundle": BundleOptions(numbers=["age"])}, "takes no numbers; omit --numbers"),
        (KIND, brats, {"network": tmp_path / "network.json"}, "omit --network"),
        (KIND, brats / "models/model.pt", {}, "is not a folder"),
        (KIND, brats / "models", {}, r"inference\.json: cannot be read"),
        (KIND, tmp_path, {}, "expected an object"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(name, weights, tmp_path / "out", **options)


def test_the_command_and_generate(zoo, tmp_path, capsys):
    """From the bundle's folder to volumes of a table, with the license that was given."""
    folder, *_ = zoo(BRAIN)
    words = ["--from", KIND, "--weights", folder, "--output", tmp_path / "out", "--license", "CC-BY-4.0", "--steps", 2]
    command([str(word) for word in words])
    assert "autoencoder.pt" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["config"]["file"] == "inference.json" and len(record["config"]["sha256"]) == 64
    assert record["scale_factor"] == 1.0 and record["networks"]["unet"]["file"] == "model.pt"
    assert "CC-BY-4.0" in (tmp_path / "out/README.md").read_text()
    (tmp_path / "table.csv").write_text(f"name,{','.join(AGES)}\nfirst,{','.join(map(str, AGES.values()))}\n")
    words = ["--pipeline", tmp_path / "out", "--conditions", tmp_path / "table.csv", "--output", tmp_path / "volumes"]
    generate([str(word) for word in [*words, "--shape", 8, 16, 8]])
    record = read_sidecar(tmp_path / "volumes/first_000.nii.gz")
    assert record["numbers"] == AGES and record["license"] == "CC-BY-4.0" and record["num_inference_steps"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_numbers": ["age"]}, "cross_attention_dim, None"),
        ({"context_numbers": ["age", "sex"], "cross_attention_dim": 3}, "cross_attention_dim, 3"),
        ({"context_numbers": ["spacing_x"], "cross_attention_dim": 1}, "none of spacing_x"),
        ({"numbers_as_channels": True}, "give their names in context_numbers"),
    ],
)
def test_numbers_of_a_unet_that_contradict_it(changes, message):
    narrow = {"channels": [8, 8], "num_res_blocks": [1, 1], "attention_levels": [False, True], "norm_num_groups": 4}
    with pytest.raises(ValueError, match=message):
        MonaiUNet3D(**narrow, num_head_channels=[0, 8], **changes)


def test_a_unet_with_numbers_and_spacing():
    """Columns in alphabetical order reach MONAI's network in its own; and it takes no other context."""
    narrow = {"channels": [8, 8], "num_res_blocks": [1, 1], "attention_levels": [False, True], "norm_num_groups": 4}
    unet = MonaiUNet3D(
        **narrow,
        num_head_channels=[0, 8],
        takes_spacing=True,
        cross_attention_dim=2,
        context_numbers=["weight", "age"],
    ).eval()
    assert unet.condition_schema.numbers == ("age", "spacing_x", "spacing_y", "spacing_z", "weight")
    calls = []
    unet.network.register_forward_pre_hook(lambda _, args, given: calls.append((args, given)), with_kwargs=True)
    latents, numbers = torch.randn(1, 4, 4, 4, 4), torch.tensor([[0.5, 1.0, 2.0, 3.0, 0.25]])
    with torch.no_grad():
        unet(latents, 1.0, numbers=numbers)
    [(args, given)] = calls
    assert torch.equal(args[0], latents) and given["context"].tolist() == [[[0.25, 0.5]]]
    assert given["spacing_tensor"].tolist() == [[100.0, 200.0, 300.0]]
    with pytest.raises(ValueError, match="the context of this model is weight, age; omit `context`"):
        unet(latents, 1.0, numbers=numbers, context=torch.zeros(1, 1, 2))
