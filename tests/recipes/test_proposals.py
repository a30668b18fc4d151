"""The rules by which values are proposed (docs/init.md)."""

import numpy as np
import pytest

from evaluation.metrics.set_distances import MIN_SIZE
from recipes.contents import _look
from recipes.proposals.intensity import propose_intensity
from recipes.proposals.machine import Machine, autoencoder_flops, unet_flops
from recipes.proposals.sizing import Facts, patch_shape, propose
from recipes.proposals.weights import Weights, find_weights
from recipes.section import TEST
from recipes.section import test_fraction as fraction_held_out

CPU = Machine(2, 16 * 2**30)
GPU = Machine(16, 64 * 2**30, "a GPU", 24 * 2**30)


def look(values):
    return _look(np.asarray(values, np.float32).reshape(-1, 1, 1), "x")


def body(lung=0.0, bone=0.0, count=10_000):
    """HU of air, soft tissue, and so much lung and bone."""
    random = np.random.default_rng(0)
    parts = [(lung, -700, 40), (bone, 800, 100), (0.2, -1000, 5), (0.8 - lung - bone, 40, 60)]
    return np.concatenate([random.normal(mean, std, round(count * share)) for share, mean, std in parts])


@pytest.mark.parametrize(
    ("lung", "bone", "window"),
    [(0, 0, (-200, 300)), (0.3, 0, (-1000, 300)), (0, 0.1, (-200, 1000)), (0.3, 0.1, (-1000, 1000))],
)
def test_the_window_of_ct_shows_what_is_there(lung, bone, window):
    proposal = propose_intensity("image", [look(body(lung, bone))])
    assert (proposal.scaling.kind, proposal.scaling.low, proposal.scaling.high) == ("window", *window)
    assert proposal.what == "HU" and not proposal.unsure


def test_ct_that_is_not_in_hu_is_said():
    proposal = propose_intensity("ct", [look(body() + 1024)])
    assert proposal.scaling.kind == "window" and "not in HU" in proposal.unsure


@pytest.mark.parametrize(("scale", "high"), [(1.0, 10.0), (4.0, 40.0), (0.1, 1.0)])
def test_the_window_of_pet_follows_its_peaks(scale, high):
    values = np.linspace(0, 10, 2001) * scale
    proposal = propose_intensity("fdg_pet", [look(values)])
    assert (proposal.scaling.low, proposal.scaling.high) == (0, high) and proposal.what == "SUV"


def test_pet_in_becquerels_is_said():
    proposal = propose_intensity("pet", [look(np.linspace(0, 40_000, 1000))])
    assert proposal.scaling.kind == "percentile" and "Bq/ml" in proposal.unsure


def test_other_values_are_scaled_by_percentiles():
    for name in ("t1", "flair", "spectrum", "image"):  # "spectrum" has "pe", "direct" has "ct"
        assert propose_intensity(name, [look(np.linspace(0, 4000, 1000))]).scaling.kind == "percentile"


def test_patches_are_multiples_within_the_smallest_volume():
    shapes = np.array([[43, 59, 30], [40, 70, 50]])
    assert patch_shape(shapes, [4, 4, 4], 10**6) == [40, 56, 28]
    assert patch_shape(shapes, [4, 4, 2], 10**6) == [40, 56, 30]
    small = patch_shape(shapes, [4, 4, 4], 20_000)
    assert np.prod(small) <= 20_000 and not any(n % 4 for n in small)
    assert patch_shape(np.array([[5, 5, 5]]), [4, 4, 4], 10**6) == [12, 12, 12]  # padded


def facts(**others):
    values = {
        "channels": ["image"], "kinds": ["percentile"], "labels": ["background", "a", "b"],
        "shapes": np.full((60, 3), 60), "spacing": [1.0, 1.0, 1.0], "subjects": 50, "volumes": 60,
    }  # fmt: skip
    return Facts(**{**values, **others})


def test_small_sets_start_from_shipped_weights():
    weights = find_weights()
    assert weights is not None and weights.vae["channels"] == [32, 128]
    assert "init_from" not in propose(facts(), CPU, weights, quick=False).vae
    few = propose(facts(subjects=12, volumes=12), CPU, weights, quick=False)
    assert few.vae["init_from"] == str(weights.folder / "vae") and "12 subjects" in few.why["vae.init_from"]
    assert few.ldm["init_from"] == str(weights.folder / "unet") and few.vae["freeze_encoder"]
    two = propose(facts(subjects=12, channels=["ct", "pet"], kinds=["window"] * 2), CPU, weights, quick=False)
    assert two.vae["init_from"] and two.vae["model"]["per_channel"] and two.vae["model"]["latent_channels"] == 12
    assert "init_from" not in two.ldm and "freeze_encoder" not in two.vae
    for unlike in ({"labels": ["background", "a"]}, {"spacing": [2.0] * 3}, {"shapes": np.full((9, 3), 90)}):
        assert "init_from" not in propose(facts(subjects=9, **unlike), CPU, weights, quick=False).ldm, unlike


def test_without_shipped_weights_that_is_said(tmp_path):
    plan = propose(facts(subjects=12), CPU, find_weights(tmp_path), quick=False)
    assert "init_from" not in plan.vae and any("no shipped weights" in text for text in plan.unsure)


def test_thick_slices_are_folded_less():
    plan = propose(facts(spacing=[0.8, 0.8, 5.0], subjects=12), CPU, find_weights(), quick=False)
    assert plan.vae["model"]["patch_size"] == [2, 2, 1] and "init_from" not in plan.vae
    assert plan.vae["crops"]["shape"][2] % 2 == 0


def test_sides_forbid_mirroring():
    assert propose(facts(), CPU, None, quick=True).vae["crops"]["flip_axes"] == [0]
    assert propose(facts(), CPU, None, quick=True, mirror=False).vae["crops"]["flip_axes"] == []
    plan = propose(facts(labels=["background", "kidney_left"]), CPU, None, quick=True)
    assert plan.vae["crops"]["flip_axes"] == [] and plan.ldm["cache"]["flip_axes"] == []
    assert "kidney_left" in plan.why["flip"]


def test_plans_grow_with_the_machine_and_the_set():
    quick, cpu, gpu = (
        propose(facts(shapes=np.full((60, 3), 160)), machine, None, quick=q)
        for machine, q in ((CPU, True), (CPU, False), (GPU, False))
    )
    sizes = [np.prod(plan.vae["crops"]["shape"]) for plan in (quick, cpu, gpu)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    steps = [plan.vae["loop"]["max_steps"] for plan in (quick, cpu, gpu)]
    assert steps == sorted(steps) and steps[0] < steps[2]
    assert gpu.vae["loop"]["mixed_precision"] == "auto" and cpu.vae["loop"]["mixed_precision"] == "no"
    assert gpu.seconds["vae"] is None
    small = propose(facts(subjects=12, volumes=12), CPU, find_weights(), quick=True)
    assert small.seconds["vae"] < 130 and small.seconds["ldm"] < 220  # of the ten minutes for all
    more = propose(facts(subjects=500, volumes=500), CPU, None, quick=False)
    assert more.ldm["loop"]["max_steps"] > propose(facts(), CPU, None, quick=False).ldm["loop"]["max_steps"]


def test_estimates_agree_with_the_measured_work():
    """docs/performance.md: 114 GFLOP for a training step of 64^3, and 66 for 8 latents of 10 x 14 x 10."""
    vae = 3 * autoencoder_flops(64**3, [32, 128], [1, 1], [1, 3], [2, 2, 2], 6)
    assert vae == pytest.approx(114e9, rel=0.25)
    assert 3 * 8 * unet_flops(1400, [64, 160], [1, 2], 6, 32) == pytest.approx(66e9, rel=0.35)
    assert CPU.seconds(vae / 3) == pytest.approx(1.03, rel=0.25)


def test_weights_know_what_is_alike():
    weights = find_weights()
    assert isinstance(weights, Weights)
    shapes = np.full((5, 3), 50)
    assert weights.is_alike(["percentile"], 3, [1.2, 1, 1], shapes)
    assert not weights.is_alike(["window"], 3, [1, 1, 1], shapes)


@pytest.mark.parametrize("subjects", range(5, 200))
def test_enough_subjects_are_held_out_for_realism(subjects):
    """As many as the smallest set that it compares, if these are a third of all at most."""
    fraction = fraction_held_out(subjects)
    assert TEST <= fraction <= 0.34
    assert (round(fraction * subjects) >= MIN_SIZE) == (subjects >= 3 * MIN_SIZE)
