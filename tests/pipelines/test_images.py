"""Images as conditions: channels that are given, from which a model generates the others."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_ldm
import train_vae
from autoencoder import AutoencoderKL3D
from diffusion import (
    Conditions,
    ConditionSchema,
    LatentCacheConfig,
    LatentUNet3D,
    collate_latents,
    denoise,
    drop_conditions,
    fold_images,
    image_condition,
    make_scheduler,
    training_loss,
)
from diffusion.latents.cache import cache_key
from pipelines import MedVolumePipeline
from training import initialize_from, ldm, ldm_step
from volumes import DataConfig, VolumeDataset, load_cases, slices_figure

TINY = {"channels": (16,), "strides": (), "blocks": (1,), "attention": (False,)}
BOTH = {"images": {"ct": 2, "pet": 1}, "in_channels": 3, "out_channels": 3}
RATES = {"ct": 0.4, "pet": 0.7}


def given_both(batch: int = 1) -> torch.Tensor:
    """ct is 1 and 2, pet is 3, on two cells."""
    latents = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1).expand(batch, 3, 1, 1, 2)
    return image_condition(latents, {"ct": slice(0, 2), "pet": slice(2, 3)})


def columns(image: torch.Tensor) -> list[list[float]]:
    """What a condition holds in the first cell, a row a sample."""
    return image[..., 0, 0, 0].tolist()


# the tensor


def test_latents_come_in_alphabetical_order_each_with_its_flag():
    images = {"pet": 1, "ct": 2}
    assert columns(given_both()) == [[1, 2, 1, 3, 1]]
    ct, pet = torch.full((2, 2, 1, 1, 2), 7.0), torch.full((2, 1, 1, 1, 2), 5.0)
    assert columns(fold_images({"pet": pet}, images, (1, 1, 2))) == [[0, 0, 0, 5, 1]] * 2
    assert columns(fold_images({"ct": ct}, images, (1, 1, 2))) == [[7, 7, 1, 0, 0]] * 2
    assert columns(fold_images({}, images, (1, 1, 2))) == [[0] * 5]


def test_latents_that_do_not_fit_are_refused():
    ct = torch.zeros(1, 2, 1, 1, 2)
    with pytest.raises(ValueError, match=r"images \['mr'\].*images of this model are \['ct'\]"):
        fold_images({"mr": ct}, {"ct": 2}, (1, 1, 2))
    with pytest.raises(ValueError, match=r"image ct: .*\(1, 2, 1, 1, 2\), expected \(1, 3, 1, 1, 2\)"):
        fold_images({"ct": ct}, {"ct": 3}, (1, 1, 2))
    with pytest.raises(ValueError, match="image ct.*expected"):
        fold_images({"ct": ct}, {"ct": 2}, (1, 2, 2))


def test_a_batch_has_its_entries_latents_and_empty_padding():
    """Entries of unlike shapes are cropped and padded; image and target must stay cell by cell the same."""
    items = []
    for name, shape in (("a", (3, 4, 3)), ("b", (5, 4, 2))):
        mean = torch.randn(3, *shape)
        items.append({"mean": mean, "std": mean.abs(), "inside": torch.ones(1, *shape, dtype=torch.bool), "name": name})
    batch = collate_latents(items, (4, 4, 4), 0, {"pet": slice(2, 3)})
    assert batch["conditions"].as_kwargs().keys() == {"image"} and batch["weight"].min() == 0
    assert torch.equal(batch["conditions"].image[:, :1], batch["mean"][:, 2:])
    assert torch.equal(batch["conditions"].image[:, 1:], batch["weight"])


# names, dropout


def test_an_image_is_dropped_with_its_flag_and_not_the_others():
    schema = ConditionSchema(classes=("sex",), images=(("ct", 2), ("pet", 1)))
    conditions = Conditions(image=given_both(), classes=torch.tensor([[1]]))
    assert conditions.names(schema) == ["sex", "ct", "pet"]
    assert columns(conditions.drop({"ct"}, schema).image) == [[0, 0, 0, 3, 1]]
    left = conditions.drop({"pet", "sex"}, schema)
    assert columns(left.image) == [[1, 2, 1, 0, 0]] and left.classes.tolist() == [[-1]]


def test_images_are_left_out_at_their_rates_and_never_all_given():
    """Were all given (0.6 x 0.3), none is: nothing would be left to generate. Of part of the channels, all may be."""
    total = 20_000
    for cover in (True, False):
        schema = ConditionSchema(images=(("ct", 2), ("pet", 1)), images_are_all=cover)
        generator = torch.Generator().manual_seed(0)
        image = drop_conditions(Conditions(image=given_both(total)), schema, RATES, generator).image
        kinds, counts = image[..., 0, 0, 0].unique(dim=0, return_counts=True)
        shares = {tuple(kind.tolist()): count.item() / total for kind, count in zip(kinds, counts, strict=True)}
        expected = {(0, 0, 0, 0, 0): 0.28, (1, 2, 1, 0, 0): 0.42, (0, 0, 0, 3, 1): 0.12, (1, 2, 1, 3, 1): 0.18}
        if cover:
            expected[0, 0, 0, 0, 0] += expected.pop((1, 2, 1, 3, 1))
        assert shares == pytest.approx(expected, abs=0.015)


# the U-Net


def test_the_unet_says_what_images_it_needs():
    unet, x = LatentUNet3D(**TINY, **BOTH, condition_dropout=RATES), torch.randn(1, 3, 1, 1, 2)
    assert unet.condition_schema == ConditionSchema(images=(("ct", 2), ("pet", 1)), images_are_all=True, dropout=RATES)
    torch.nn.init.normal_(unet.conv_out.weight)
    with torch.no_grad():
        assert torch.equal(unet(x, 1).sample, unet(x, 1, image=torch.zeros(1, 5, 1, 1, 2)).sample)
        assert (unet(x, 1).sample - unet(x, 1, image=given_both()).sample).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"expected \(1, 5, 1, 1, 2\)"):
        unet(x, 1, image=given_both()[:, :4])
    with pytest.raises(ValueError, match="without image conditions"):
        LatentUNet3D(**TINY, in_channels=3)(x, 1, image=given_both())
    always = LatentUNet3D(**TINY, in_channels=3, images={"ct": 2})
    assert not always.condition_schema.images_are_all
    with pytest.raises(ValueError, match="never trained without ct"):
        always(x, 1)


def test_images_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="rate above 0 for pet"):
        LatentUNet3D(**TINY, **BOTH, condition_dropout={"ct": 0.5})
    with pytest.raises(ValueError, match="3 or fewer together"):
        LatentUNet3D(**TINY, in_channels=3, images={"ct": 2, "pet": 2}, condition_dropout=RATES)
    with pytest.raises(ValueError, match=r"\['sex'\] name two"):
        LatentUNet3D(**TINY, in_channels=3, images={"sex": 2}, classes={"sex": ["F", "M"]})


def test_a_model_without_images_is_fine_tuned_to_take_them(tmp_path):
    """Only the first convolution, which has more channels now, is fresh."""
    LatentUNet3D(**TINY, in_channels=3, out_channels=3).save_pretrained(tmp_path)
    unet = LatentUNet3D(**TINY, **BOTH, condition_dropout=RATES)
    assert initialize_from(unet, tmp_path, new="condition_embedding") == ["conv_in"]
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    own = unet.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in own if not key.startswith("conv_in"))


# a model that must obey: the latents of b are those of a, negated

GRID, NEGATED = (1, 3, 1), {"a": 1, "b": 1}


@pytest.fixture(scope="module")
def adherent() -> LatentUNet3D:
    torch.manual_seed(0)
    generator, weight = torch.Generator().manual_seed(0), torch.ones(64, 1, *GRID)
    unet = LatentUNet3D(**TINY, in_channels=2, out_channels=2, images=NEGATED, condition_dropout={"a": 0.3, "b": 0.5})
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=120)
    for _ in range(120):
        a = torch.randn(64, 1, *GRID, generator=generator)
        latents = torch.cat([a, -a], 1)
        conditions = Conditions(image=image_condition(latents, {"a": slice(0, 1), "b": slice(1, 2)}))
        conditions = drop_conditions(conditions, unet.condition_schema, unet.config["condition_dropout"], generator)
        optimizer.zero_grad()
        training_loss(unet, "rectified_flow", latents, conditions, weight, generator).backward()
        optimizer.step()
        schedule.step()
    return unet.eval()


def sampled(unet: LatentUNet3D, image: torch.Tensor, steps: int = 8, **options) -> torch.Tensor:
    """(B, 2, ...): a and b, from the same noise each time."""
    noise = torch.randn(len(image), 2, *GRID, generator=torch.Generator().manual_seed(1))
    scheduler, schema = make_scheduler("rectified_flow"), unet.condition_schema
    with torch.no_grad():
        return denoise(
            unet, noise, scheduler, Conditions(image=image), num_inference_steps=steps, schema=schema, **options
        )


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


@pytest.mark.parametrize("name,other,flag", [("a", 1, 1), ("b", 0, 3)])
def test_what_is_given_decides_what_is_generated(adherent, name, other, flag):
    known = torch.randn(64, 1, *GRID, generator=torch.Generator().manual_seed(5))
    image = fold_images({name: known}, NEGATED, GRID)
    assert correlation(sampled(adherent, image)[:, other], known) < -0.9
    free = sampled(adherent, torch.zeros_like(image))
    assert abs(correlation(free[:, other], known)) < 0.3 and correlation(free[:, 0], free[:, 1]) < -0.9
    image[:, flag] = 0  # the latents are there still, but are said not to be
    assert correlation(sampled(adherent, image)[:, other], known) > -0.8


def test_guidance_by_an_image_follows_the_formula(adherent):
    image = fold_images({"a": torch.ones(4, 1, *GRID)}, NEGATED, GRID)
    conditioned, free = sampled(adherent, image, 1), sampled(adherent, torch.zeros_like(image), 1)
    assert (conditioned - free).abs().max() > 0.1
    for scale in ({"a": 2.0}, 2.0):
        guided = sampled(adherent, image, 1, guidance_scale=scale)
        assert torch.allclose(guided, 2 * conditioned - free, atol=1e-4)


# from files to a pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five cases of two channels, and an autoencoder that codes them apart."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in "vwxyz":
        for channel in ("ct", "pet"):
            values = rng.normal(size=(11, 12, 13)).astype(np.float32)
            nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{name}_{channel}.nii.gz")
    torch.manual_seed(0)
    arguments = {"channels": (4, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1), "latent_channels": 6}
    vae = AutoencoderKL3D(in_channels=2, out_channels=2, per_channel=True, **arguments)
    vae.set_latent_statistics([0.1] * 6, [0.5] * 6)
    vae.register_to_config(channel_names=["ct", "pet"])
    vae.save_pretrained(folder / "vae")
    AutoencoderKL3D(
        in_channels=2, out_channels=2, **arguments, latents_std=[1.0] * 6, latents_mean=[0.0] * 6
    ).save_pretrained(folder / "mixed")
    return folder


def data_of(folder: Path, **changes) -> DataConfig:
    return DataConfig(
        root=str(folder),
        images={"ct": "{name}_ct.nii.gz", "pet": "{name}_pet.nii.gz"},
        validation_fraction=0.2,
        **changes,
    )


def train(folder: Path, output: Path, *args: str) -> dict[str, float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_ldm.main(
        [
            f"--output={output}",
            f"--vae={folder / 'vae'}",
            f"--data.root={folder}",
            "--data.images={ct: '{name}_ct.nii.gz', pet: '{name}_pet.nii.gz'}",
            "--data.validation_fraction=0.2",
            "--data.condition_channels=[ct, pet]",
            "--model={class: diffusion.LatentUNet3D, channels: [8, 16], blocks: [1, 1], head_dim: 8}",
            "--model.condition_dropout={ct: 0.5, pet: 0.5}",
            *(
                f"--loop.{o}"
                for o in ("max_steps=2", "batch_size=2", "validate_every=1", "preview_every=2", "previews=1")
            ),
            *("--loop.mixed_precision=no", "--loop.trackers=[]", "--inference_steps=2"),
            *args,
        ]
    )


def test_a_run_learns_all_channels_from_those_given(folder, tmp_path, monkeypatch):
    seen, drawn, previewed = [], [], []
    loss, figure, denoised = ldm_step.training_loss, slices_figure, ldm_step.denoise
    monkeypatch.setattr(ldm_step, "denoise", lambda *a, **k: (previewed.append(a[3].image), denoised(*a, **k))[1])
    monkeypatch.setattr(ldm_step, "training_loss", lambda *a, **k: (seen.append(a[3].image), loss(*a, **k))[1])
    monkeypatch.setattr("volumes.slices_figure", lambda columns: (drawn.append(columns), figure(columns))[1])
    encode, latents = ldm.encode_held_out, []
    monkeypatch.setattr(ldm, "encode_held_out", lambda *a, **k: (latents.extend(made := encode(*a, **k)), made)[1])
    metrics = train(folder, tmp_path)
    # after two steps of warm-up the model predicts next to nothing: it is wrong by noise less latents
    assert metrics["loss"] == pytest.approx(1 + latents[0]["latents"].square().mean().item(), rel=0.1)
    flags = torch.cat([image[:, [3, 7], 1, 1, 1] for image in seen])
    assert {tuple(row) for row in flags.tolist()} == {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)}
    assert list(drawn[0][0]["images"]) == ["real", "generated"] and drawn[0][0]["channels"] == ["ct", "pet"]
    assert metrics["loss"] == pytest.approx((metrics["loss/ct"] + metrics["loss/pet"]) / 2, rel=1e-5)
    assert previewed and not any(image.any() for image in previewed)  # what can be left out is generated
    config = json.loads((tmp_path / "pipeline/unet/config.json").read_text())
    assert config["images"] == {"ct": 3, "pet": 3} and config["in_channels"] == 6
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.data.channels == ("ct", "pet")
    assert pipe.unet.conv_in.weight.shape[1] == 6 + 2 * (3 + 1)


def test_an_autoencoder_that_mixes_channels_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="per_channel: true"):
        train(folder, tmp_path, f"--vae={folder / 'mixed'}")


def test_an_autoencoder_knows_its_channels_names(folder, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    train_vae.main(
        [
            f"--output={tmp_path}",
            f"--data.root={folder}",
            "--data.images={ct: '{name}_ct.nii.gz', pet: '{name}_pet.nii.gz'}",
            "--data.validation_fraction=0",
            "--model={class: autoencoder.AutoencoderKL3D, in_channels: 2, out_channels: 2, channels: [4, 8], "
            "per_channel: true}",
            "--crops.shape=[8, 8, 8]",
            *("--loop.max_steps=1", "--loop.previews=0", "--loop.mixed_precision=no", "--loop.trackers=[]"),
        ]
    )
    assert AutoencoderKL3D.from_pretrained(tmp_path / "vae").config["channel_names"] == ["ct", "pet"]


def test_channels_in_the_wrong_order_are_refused(folder, tmp_path):
    """In another order than the autoencoder's."""
    swapped = "--data.images={pet: '{name}_pet.nii.gz', ct: '{name}_ct.nii.gz'}"
    with pytest.raises(ValueError, match=r"channels are \['pet', 'ct'\], the autoencoder learned \['ct', 'pet'\]"):
        train(folder, tmp_path, swapped)


def test_an_image_that_is_never_left_out_is_in_previews_too(folder, tmp_path, monkeypatch):
    conditions, original = [], ldm_step.denoise
    monkeypatch.setattr(ldm_step, "denoise", lambda *a, **k: (conditions.append(a[3].image), original(*a, **k))[1])
    train(folder, tmp_path, "--data.condition_channels=[ct]", "--model.condition_dropout={}", "--loop.max_steps=1")
    assert conditions[0].shape[1] == 4 and (conditions[0][:, 3] == 1).all()


def test_the_cache_does_not_depend_on_what_is_given(folder):
    vae = AutoencoderKL3D.from_pretrained(folder / "vae")
    datasets = [
        VolumeDataset(load_cases(config), config)
        for config in (data_of(folder), data_of(folder, condition_channels=["ct"]))
    ]
    assert len({cache_key(dataset, vae, LatentCacheConfig()) for dataset in datasets}) == 1


def test_channels_that_cannot_be_given_are_refused():
    with pytest.raises(ValueError, match=r"condition_channels names \['mr'\], the image channels are \['ct', 'pet'\]"):
        data_of(Path(), condition_channels=["mr"])
    with pytest.raises(ValueError, match="twice"):
        data_of(Path(), condition_channels=["ct", "ct"])
    with pytest.raises(ValueError, match="several channels"):
        DataConfig(images="*.nii.gz", condition_channels=["image"])
