"""The rules by which values are proposed (docs/init.md)."""

import numpy as np
import pytest

from evaluation.metrics.set_distances import MIN_SIZE
from recipes.contents import _look
from recipes.proposals.intensity import propose_intensity
from recipes.proposals.machine import Machine, autoencoder_flops, unet_flops
from recipes.proposals.sizing import Facts, patch_shape, propose
from recipes.proposals.starts import Start, choose_start
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


def test_volumes_thinner_than_a_patch_are_said():
    """32 x 32 x 1: the patch has 12 voxels along z, 11 of which are padding."""
    plan = propose(facts(shapes=np.array([[32, 32, 1]] * 20)), CPU, Start(), quick=False)
    depth = plan.vae["crops"]["shape"][2]
    assert depth == 12 and "within" not in plan.why["vae.crops"] and "padded along z" in plan.why["vae.crops"]
    assert any("fewer than a patch along z: 92%" in line for line in plan.unsure)
    plan = propose(facts(shapes=np.array([[32, 32, 32]] * 20)), CPU, Start(), quick=False)
    assert "within the smallest volume" in plan.why["vae.crops"] and not any("padding" in line for line in plan.unsure)


def facts(**others):
    values = {
        "channels": ["image"], "kinds": ["percentile"], "labels": ["background", "a", "b"],
        "shapes": np.full((60, 3), 60), "spacing": [1.0, 1.0, 1.0], "subjects": 50, "volumes": 60,
    }  # fmt: skip
    return Facts(**{**values, **others})


def planned(quick=False, asked=None, exactly=False, **others):
    given = facts(**others)
    return propose(given, CPU, choose_start(asked, given, quick=quick, exactly=exactly), quick=quick)


def test_small_sets_start_from_shipped_weights():
    weights = find_weights()
    assert weights is not None and weights.vae["channels"] == [32, 128]
    enough = planned()
    assert "init_from" not in enough.vae and "50 subjects to train on; --from hippocampus takes" in enough.start.line
    some = planned(subjects=49, volumes=49)
    assert (some.vae["init_from"], some.ldm["init_from"]) == ("shipped:hippocampus/vae", "shipped:hippocampus/unet")
    assert some.vae["freeze_encoder"] and "lora" not in some.ldm and some.ldm["optimizer"]["learning_rate"] == 3e-4
    for said in ("49 subjects", "hippocampus fits", "2 labels", "--from hippocampus:lora", "--from none",
                 "anatomy was not compared, and its labels stand anterior for a, posterior for b"):  # fmt: skip
        assert said in some.start.line
    few = planned(subjects=12, volumes=12)
    assert few.ldm["lora"] and "residual_noise" not in few.ldm and [stage for stage, _ in few.trainings] == ["ldm"]
    assert (
        "anatomy was not compared" in few.start.line
        and "a LoRA of its U-Net" in few.start.line
        and "--from hippocampus trains all weights" in few.start.line
    )
    known = planned(subjects=12, conditions=["sex"])  # that a LoRA's base does not know
    assert known.ldm["init_from"] and "lora" not in known.ldm
    two = planned(subjects=12, channels=["ct", "pet"], kinds=["window"] * 2)
    assert two.vae["init_from"] and two.vae["model"]["per_channel"] and two.vae["model"]["latent_channels"] == 12
    assert "init_from" not in two.ldm and "freeze_encoder" not in two.vae
    assert "one channel without a unit, the images have 2 (window, window)" in two.start.line
    for unlike in ({"labels": ["background", "a"]}, {"spacing": [2.0] * 3}, {"shapes": np.full((9, 3), 90)},
                   {"shapes": np.full((9, 3), 20)}):  # fmt: skip
        plan = planned(subjects=9, **unlike)
        assert "init_from" in plan.vae and "init_from" not in plan.ldm and "it knows" in plan.start.line, unlike
    quick = planned(quick=True)
    assert "init_from" in quick.vae and "init_from" not in quick.ldm and "--quick leaves" in quick.start.line


def test_what_to_start_from_is_the_users_choice():
    assert "init_from" not in planned(subjects=12, asked="none").vae
    all_weights = planned(subjects=12, asked="hippocampus")
    assert all_weights.ldm["init_from"] and all_weights.vae["freeze_encoder"] and "lora" not in all_weights.ldm
    assert planned(asked="hippocampus:lora").ldm["lora"]
    quick = planned(quick=True, asked="hippocampus")
    assert quick.ldm["init_from"] and quick.ldm["model"]["channels"] == [64, 160]
    with pytest.raises(ValueError, match=r"a LoRA needs .* it does not know the condition sex; say --from hippocampus"):
        planned(asked="hippocampus:lora", conditions=["sex"])
    with pytest.raises(ValueError, match=r"it knows voxels of 1 x 1 x 1 mm, these are 1.2 x 1.2 x 1.2"):
        planned(asked="hippocampus:lora", spacing=[1.2] * 3, exactly=True)
    for asked in ("hippocampus-masks", "brain", "hippocampus:all"):  # the first has label maps
        with pytest.raises(ValueError, match=rf"--from {asked}: no shipped .* say --from hippocampus, --from hippo"):
            planned(asked=asked)


def test_without_shipped_weights_that_is_said(tmp_path):
    start = choose_start(None, facts(subjects=12), folder=tmp_path)
    assert start.weights is None and "this installation has no shipped ones" in start.line
    with pytest.raises(ValueError, match="say --from none"):
        choose_start("hippocampus", facts(), folder=tmp_path)


def test_thick_slices_are_folded_less():
    plan = planned(spacing=[0.8, 0.8, 5.0], subjects=12)
    assert plan.vae["model"]["patch_size"] == [2, 2, 1] and "init_from" not in plan.vae
    assert plan.vae["crops"]["shape"][2] % 2 == 0 and "much longer than wide" in plan.start.line
    with pytest.raises(ValueError, match="say --from none, or --spacing X Y Z"):
        planned(spacing=[0.8, 0.8, 5.0], asked="hippocampus")


def test_sides_forbid_mirroring():
    assert propose(facts(), CPU, Start(), quick=True).vae["crops"]["flip_axes"] == [0]
    assert propose(facts(), CPU, Start(), quick=True, mirror=False).vae["crops"]["flip_axes"] == []
    plan = propose(facts(labels=["background", "kidney_left"]), CPU, Start(), quick=True)
    assert plan.vae["crops"]["flip_axes"] == [] and plan.ldm["cache"]["flip_axes"] == []
    assert "kidney_left" in plan.why["flip"]


def test_plans_grow_with_the_machine_and_the_set():
    quick, cpu, gpu = (
        propose(facts(shapes=np.full((60, 3), 160)), machine, Start(), quick=q)
        for machine, q in ((CPU, True), (CPU, False), (GPU, False))
    )
    sizes = [np.prod(plan.vae["crops"]["shape"]) for plan in (quick, cpu, gpu)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    steps = [plan.vae["loop"]["max_steps"] for plan in (quick, cpu, gpu)]
    assert steps == sorted(steps) and steps[0] < steps[2]
    assert gpu.vae["loop"]["mixed_precision"] == "auto" and cpu.vae["loop"]["mixed_precision"] == "no"
    assert gpu.seconds["vae"] is None
    small = planned(subjects=12, volumes=12, quick=True)
    assert small.seconds["vae"] < 130 and small.seconds["ldm"] < 220  # of the ten minutes for all
    more = propose(facts(subjects=500, volumes=500), CPU, Start(), quick=False)
    assert more.ldm["loop"]["max_steps"] > propose(facts(), CPU, Start(), quick=False).ldm["loop"]["max_steps"]


def test_large_latents_have_shifted_timesteps():
    """128 voxels and a stride of 4 are 32 latent voxels a side, at which nothing shifts."""
    small, large = (propose(facts(shapes=np.full((60, 3), n)), GPU, Start(), quick=False) for n in (128, 132))
    assert "shift_voxels" not in small.ldm["model"] and "shifted" not in small.why["ldm.model"]
    assert large.ldm["model"]["shift_voxels"] == 32**3 and "35937 latent voxels" in large.why["ldm.model"]


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
    assert not weights.misfits(["percentile"], 3, [1.2, 1, 1], shapes)
    assert weights.misfits(["percentile"], 3, [1.2, 1, 1], shapes, exactly=True)
    assert weights.misfits(["window"], 3, [1, 1, 1], shapes)
    assert not weights.misfits(["percentile"], 3, [1, 1, 1], np.full((5, 3), 64))
    assert weights.smallest == (32, 40, 26)
    assert not weights.misfits(["percentile"], 3, [1, 1, 1], np.full((5, 3), 27))  # 40 / 1.5
    (said,) = weights.misfits(["percentile"], 3, [1, 1, 1], np.full((5, 3), 26))
    assert said == "it knows volumes of 32 x 40 x 26 to 43 x 59 x 47 voxels, the median here is 26 x 26 x 26"
    assert weights.misfits(["percentile"], 3, [1.4, 1.4, 1.4], np.full((5, 3), 64))  # 90 at 1 mm


@pytest.mark.parametrize("subjects", range(5, 200))
def test_enough_subjects_are_held_out_for_realism(subjects):
    """As many as the smallest set that it compares, if these are a third of all at most."""
    fraction = fraction_held_out(subjects)
    assert TEST <= fraction <= 0.34
    assert (round(fraction * subjects) >= MIN_SIZE) == (subjects >= 3 * MIN_SIZE)
