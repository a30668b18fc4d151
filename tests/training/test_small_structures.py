"""Runs with weights for labels and with masks that are hidden in part: what they train, log, save and refuse."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from short_runs import run, vae_folder  # noqa: F401
from torch import nn
from vae_steps import batch, generators, make_step

import train_ldm
from autoencoder import SpaceToDepth3D
from autoencoder.losses.reconstruction import gradient_loss, l1_loss, masked_mean, mse_loss
from diffusion import Conditions, LatentUNet3D, fold_mask, make_scheduler, unfold_mask
from training import LdmTrainingStep, OptimizerConfig
from training.engine.learner import Learner
from training.label_weights import check_best_by, check_partial_masks, label_weights, weights_by_index
from training.ldm import init_unet
from volumes import UNKNOWN, DataConfig

WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"
LABELS = {0: "background", 1: "body", 2: "organ", 3: "lesion"}


def test_labels_are_found_by_name_and_by_value():
    assert weights_by_index({"lesion": 100, 2: 3.0}, {0: "background", 2: "organ", 5: "lesion"}) == {2: 100.0, 1: 3.0}
    assert weights_by_index({}, {}) == {}
    for weights, labels, message in (
        ({"tumor": 2}, LABELS, r"names \['tumor'\]; the labels of the masks are 0 \(background\)"),
        ({"lesion": 2, 3: 5}, LABELS, "names a label twice"),
        ({"lesion": 2}, {}, "the data has no masks"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_by_index(weights, labels)


def test_a_name_of_several_labels_is_refused():
    """The weights of two labels of one name would be one entry of a log."""
    labels = {0: "background", 1: "tumor", 2: "tumor"}
    said = "labels 1, 2 are all called 'tumor'; give each a name of its own in data.label_names"
    assert weights_by_index({1: 5, 2: 10}, labels) == {1: 5.0, 2: 10.0}
    with pytest.raises(ValueError, match=said):
        weights_by_index({"tumor": 5}, labels)
    network = SimpleNamespace(num_labels=3)
    for weights in ({1: 5, 2: 10}, {2: 10}):
        config = SimpleNamespace(loss_weights=weights, data=SimpleNamespace(channels=["MR"]))
        with pytest.raises(ValueError, match=said):
            label_weights(config, labels, network)


def test_a_label_of_the_value_of_unknown_is_one_like_others():
    masks = {"masks": "m/{x}.nii.gz", "label_map": {255: UNKNOWN}}
    for names, refused in (({UNKNOWN: "air", 0: "body"}, False), ({0: "body"}, True)):
        config = SimpleNamespace(data=DataConfig(images="i/{x}.nii.gz", label_names=names, **masks), model={})
        with pytest.raises(ValueError, match="set model.partial_masks") if refused else nullcontext():
            check_partial_masks(config)


def test_a_run_weighs_lesions_and_hides_masks(tmp_path, vae_folder):  # noqa: F811
    """The validation has the loss inside the label; a model of partial masks has one more row for each place."""
    args = [f"--vae={vae_folder}", "--loop.max_steps=2"]
    run(train_ldm, tmp_path / "plain", *args)
    metrics = run(train_ldm, tmp_path / "weighted", *args, "--loss_weights={lesion: 100}")
    plain, weighted = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "weighted"))
    assert not all(torch.equal(plain[key], weighted[key]) for key in plain)
    assert metrics.keys() == {"loss", "loss/lesion"} and metrics["loss"] != metrics["loss/lesion"]

    finetuned = [*args, f"--init_from={tmp_path}/plain/pipeline/unet", "--model.partial_masks=0.5"]
    run(train_ldm, tmp_path / "partial", *finetuned)
    config = json.loads((tmp_path / "partial/pipeline/unet/config.json").read_text())
    assert config["partial_masks"] == 0.5
    table = load_file(tmp_path / "partial" / WEIGHTS)["mask_embedding.table.weight"]
    assert len(table) == 5 * 64 + 1 and table[-64:].any()  # it was trained


def test_settings_that_cannot_be_used_are_named(tmp_path, vae_folder):  # noqa: F811
    args = [f"--vae={vae_folder}"]
    with pytest.raises(ValueError, match=r"loss_weights names \['tumor'\]"):
        run(train_ldm, tmp_path / "a", *args, "--loss_weights={tumor: 2}")
    with pytest.raises(ValueError, match="trained without a mask"):
        run(train_ldm, tmp_path / "b", *args, "--loss_weights={lesion: 2}", "--model.num_labels=0")
    with pytest.raises(ValueError, match=r"unknown where masks hold 3 \(-2\); set model.partial_masks"):
        run(train_ldm, tmp_path / "c", *args, "--data.label_map={3: -2}")


def test_the_label_to_judge_by_is_in_a_held_out_mask():
    def held_out(*counts) -> Any:
        return SimpleNamespace(facts=[SimpleNamespace(mask=SimpleNamespace(counts=one)) for one in counts])

    weights = {"lesion": (2, 100.0)}
    check_best_by("loss/lesion", weights, held_out((9, 1, 0), (9, 0, 1)))
    for best_by in (None, "loss", "kernel_distance"):
        check_best_by(best_by, weights, held_out((9, 1, 0)))
    with pytest.raises(ValueError, match="loop.best_by loss/lesion: no held-out mask has this label"):
        check_best_by("loss/lesion", weights, held_out((9, 1, 0), (9, 2, 0)))


def test_weights_below_1_keep_the_scale_of_the_losses():
    made, fov = torch.full((1, 1, 2, 2, 2), 3.0), torch.ones(1, 1, 2, 2, 2, dtype=torch.bool)
    assert masked_mean(made, fov, torch.full_like(made, 0.01)).item() == pytest.approx(3.0)
    assert masked_mean(made, fov, torch.zeros_like(made)).item() == 0


def step_of(**changes) -> LdmTrainingStep:
    torch.manual_seed(0)
    model = {key: changes.pop(key) for key in ("partial_masks",) if key in changes}
    network = LatentUNet3D(
        8, 8, channels=(8,), strides=(), blocks=(1,), attention=(False,), num_labels=4, mask_stride=2, mask_width=4,
        **model,
    )  # fmt: skip
    nn.init.normal_(network.conv_out.weight, std=0.1)
    learner = Learner("unet", network, OptimizerConfig(warmup_steps=0), ema_decay=0.0, max_steps=10)
    learner.prepare(Accelerator(cpu=True))
    return LdmTrainingStep(learner, SpaceToDepth3D(), 4, ["MR"], lambda: make_scheduler("rectified_flow"), **changes)


def latents_and_mask() -> dict:
    labels = torch.randint(0, 3, (1, 6, 6, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 2, 3, 2:4] = 3
    mask = fold_mask(labels, (2, 2, 2), 4, partial=True)
    mean = torch.randn(1, 8, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    return {"latents": mean, "inside": torch.ones(1, 1, 3, 3, 3, dtype=torch.bool), "conditions": Conditions(mask=mask)}


def test_the_loss_of_a_label_is_that_of_its_latent_voxels():
    """What predicts 0 is wrong by noise minus latents: the two latent voxels of the lesion are made large."""
    item, step = latents_and_mask(), step_of(label_weights={"lesion": (3, 100.0)})
    with torch.no_grad():
        step.unet.average.conv_out.weight.zero_()
    there = (item["conditions"].mask - 1) // 8 == 3
    assert there.any(-1).sum() == 1
    item["latents"][:, :, there[0].any(-1)] = 10.0
    found = step.validate(item, torch.Generator().manual_seed(0))
    assert found["loss/lesion"] == pytest.approx(101, rel=0.1)
    assert found["loss"] == pytest.approx(found["loss/lesion"] / 27 + 2 * 26 / 27, rel=0.1)  # not weighted
    plain = step_of()
    with torch.no_grad():
        plain.unet.average.conv_out.weight.zero_()
    assert plain.validate(item, torch.Generator().manual_seed(0)) == {"loss": found["loss"]}
    without = replace(item["conditions"], mask=item["conditions"].mask.where(~there, 1))
    assert step.validate({**item, "conditions": without}, torch.Generator().manual_seed(0)).keys() == {"loss"}


def test_a_step_hides_parts_of_the_mask_and_weighs_the_whole():
    step = step_of(partial_masks=0.9, label_weights={"lesion": (3, 100.0)})
    item, seen = latents_and_mask(), []
    batched = {"mean": item["latents"], "std": torch.zeros(1, 8, 3, 3, 3), "weight": torch.ones(1, 1, 3, 3, 3)}

    def loss(model, objective, latents, conditions, weight, generators, **how):
        seen.append((conditions.mask, how["emphasis"]))
        return model(latents, torch.tensor([1.0]), **conditions.as_kwargs()).sample.square().mean()

    step.loss = loss
    for seed in range(8):
        step({**batched, "conditions": item["conditions"]}, [torch.Generator().manual_seed(seed)])
    unknown = [(unfold_mask(mask, (2, 2, 2), 4) == UNKNOWN).any().item() for mask, _ in seen]
    assert 5 <= sum(unknown) <= 8
    assert all(int((emphasis == 100).sum()) == 1 for _, emphasis in seen)


def test_unknown_starts_at_zero_in_a_model_of_whole_masks(tmp_path):
    """A finetuned model of partial masks predicts of whole masks what it did, and of unknown voxels as without them."""
    torch.manual_seed(0)
    settings = {"channels": (8,), "strides": (), "blocks": (1,), "attention": (False,), "num_labels": 4}
    whole = LatentUNet3D(**settings)
    nn.init.normal_(whole.conv_out.weight, std=0.1)
    whole.save_pretrained(tmp_path)
    partial = LatentUNet3D(**settings, partial_masks=0.3)
    assert init_unet(partial, tmp_path) == []
    labels, latents = torch.randint(0, 4, (1, 8, 8, 8)), torch.randn(1, 4, 2, 2, 2)
    ids = fold_mask(labels, (4, 4, 4), 4)
    with torch.no_grad():
        torch.testing.assert_close(whole(latents, 500, mask=ids).sample, partial(latents, 500, mask=ids).sample)
        hidden = fold_mask(torch.full_like(labels, UNKNOWN), (4, 4, 4), 4, partial=True)
        assert not partial.embed_mask(hidden).any()
        assert partial.embed_mask(ids).any()


def test_the_autoencoder_weighs_voxels_of_labels():
    step, of_labels = make_step(), make_step()
    of_labels.label_weights = {1: 30.0}
    item = batch()
    item["mask"] = torch.zeros(2, 8, 8, 8, dtype=torch.int16)
    item["mask"][:, 3, 4, 2:4] = 1
    plain, weighted = step(item, generators()), of_labels(item, generators())
    assert weighted["l1"] != plain["l1"] and weighted["gradient"] != plain["gradient"]
    target, made = item["image"], torch.zeros_like(item["image"])
    emphasis = torch.where(item["mask"] == 1, 30.0, 1.0)[:, None]
    weight = emphasis * item["fov"]
    by_hand = ((made - target).abs() * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
    torch.testing.assert_close(l1_loss(made, target, item["fov"], emphasis), by_hand.mean())
    by_hand = ((made - target).square() * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
    torch.testing.assert_close(mse_loss(made, target, item["fov"], emphasis), by_hand.mean())
    ones = torch.ones_like(emphasis)
    torch.testing.assert_close(gradient_loss(made, target, item["fov"], ones), gradient_loss(made, target, item["fov"]))
    assert gradient_loss(made, target, item["fov"], emphasis) != gradient_loss(made, target, item["fov"])


def test_the_loss_of_a_label_has_the_noise_of_the_whole():
    """Of a mask that is the label everywhere, it is the loss itself."""
    step = step_of(label_weights={"lesion": (3, 100.0)})
    item = latents_and_mask()
    everywhere = fold_mask(torch.full((1, 6, 6, 6), 3), (2, 2, 2), 4)
    found = step.validate({**item, "conditions": Conditions(mask=everywhere)}, torch.Generator().manual_seed(0))
    assert found["loss/lesion"] == pytest.approx(found["loss"], rel=1e-6)
