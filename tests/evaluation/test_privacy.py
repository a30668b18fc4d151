"""Planted copies are found, at their rate; independent draws are not, beyond the rate that was allowed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from autoencoder import AutoencoderKL3D
from evaluation.copies.fingerprints import CopyCheck
from evaluation.metrics.memorization import (
    attack,
    distance_ratio,
    loss_attack,
    memorized,
    own_mask,
    reidentification,
)
from evaluation.metrics.nearest import (
    Match,
    Space,
    aligned,
    best_match,
    common_crop,
    feature_space,
    latent_space,
    similarity_matrix,
)
from evaluation.stats.conformal import conformal_threshold
from evaluation.stats.intervals import wilson
from evaluation.studies.privacy import VolumeSet, pairs_figure, privacy_report

CROP = (12, 12, 12)
SPACE = Space(CROP, flips=(0,), shift=2)


def smooth(count: int, seed: int, sides=(16, 16, 16)) -> np.ndarray:
    """(count, 1, X, Y, Z): white noise, averaged over 3 x 3 x 3 voxels."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 1, *sides))).float()
    return F.avg_pool3d(noise, 3, stride=1, padding=1).numpy()


def disguised(volume: np.ndarray, seed: int, noise: float = 0.2) -> np.ndarray:
    """A copy, moved by up to 2 voxels along each axis, mirrored or not, of other intensities, with noise."""
    random = np.random.default_rng(seed)
    moved = np.roll(volume, random.integers(-2, 3, 3), (1, 2, 3))
    mirrored = moved[:, ::-1] if random.random() < 0.5 else moved
    return 40 * (mirrored + noise * volume.std() * random.normal(size=volume.shape)) + 1000


def units_of(count: int, prefix: str, each: int = 1) -> list[str]:
    return [f"{prefix}{index // each:03d}" for index in range(count)]


def test_a_copy_has_similarity_one_wherever_it_went():
    volume = smooth(1, 0, (18, 17, 16))[0]
    copy = np.roll(volume, (2, -1, 1), (1, 2, 3))[:, ::-1] * 13 - 400
    match = best_match(copy, volume, SPACE)
    assert match.similarity == pytest.approx(1, abs=1e-5) and match.flip == (0,) and match.shift[1:] == (-1, 1)
    placed = aligned(copy, match, CROP)
    still = aligned(volume, Match(1.0, (), (0, 0, 0)), CROP)
    inside = (slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    assert np.allclose(placed[inside], 13 * still[inside] - 400, atol=1e-3)
    assert best_match(copy, volume, Space(CROP, shift=2)).similarity < 0.7  # not without the flip


def test_similarity_is_pearsons_over_the_overlap():
    a, b = smooth(2, 1)
    match = best_match(a, b, SPACE)
    u = match.shift
    of_a = a[0, 2:14, 2:14, 2:14][:: -1 if match.flip else 1]
    of_b = b[0, 2:14, 2:14, 2:14]
    cut = [slice(max(s, 0), 12 + min(s, 0)) for s in u], [slice(max(-s, 0), 12 + min(-s, 0)) for s in u]
    wanted = np.corrcoef(of_a[tuple(cut[0])].ravel(), of_b[tuple(cut[1])].ravel())[0, 1]
    assert match.similarity == pytest.approx(wanted, abs=1e-5)
    still = similarity_matrix([a], [b], Space(CROP))[0, 0]
    assert still == pytest.approx(np.corrcoef(a[0, 2:14, 2:14, 2:14].ravel(), of_b.ravel())[0, 1], abs=1e-5)
    assert match.similarity > still


def test_chunks_shapes_and_channels_change_nothing():
    volumes = smooth(5, 2)
    whole = similarity_matrix(volumes, volumes, SPACE)
    counted: list[int] = []
    pieces = similarity_matrix(volumes, volumes, SPACE, chunk_bytes=100_000, on_pairs=counted.append)
    assert np.allclose(whole, pieces, atol=1e-5) and sum(counted) == 25 and len(counted) > 2
    assert np.allclose(whole, whole.T, atol=1e-5) and np.allclose(np.diag(whole), 1, atol=1e-5)
    wider = [np.pad(volumes[0], ((0, 0), (3, 3), (1, 1), (0, 0))), volumes[1]]
    assert np.allclose(similarity_matrix(wider, volumes, SPACE), whole[:2], atol=1e-5)
    constant = [np.concatenate([volume, np.full_like(volume, 7.3)]) for volume in volumes]
    assert np.allclose(similarity_matrix(constant[:1], constant, SPACE), whole[:1], atol=1e-5)
    assert common_crop([volumes[0].shape, wider[0].shape], (20, 12, 20)) == (16, 12, 16)


def test_what_cannot_be_compared_is_refused():
    volumes = smooth(2, 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        similarity_matrix(volumes, np.where(volumes > 0.5, np.nan, volumes), SPACE)
    with pytest.raises(ValueError, match="shift 6"):
        similarity_matrix(volumes, volumes, Space(CROP, shift=6))
    with pytest.raises(ValueError, match="0 volumes"):
        similarity_matrix([], volumes, SPACE)
    with pytest.raises(ValueError, match="axes"):
        similarity_matrix(volumes, volumes, Space(CROP, flips=(3,)))


def test_copies_are_nearest_in_latents_and_in_features():
    volumes = smooth(6, 4)
    copies = [3 * volume[:, ::-1] + 50 for volume in volumes[:3]]
    torch.manual_seed(0)
    vae = AutoencoderKL3D(latent_channels=4, channels=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).eval()

    def extractor(x: torch.Tensor) -> torch.Tensor:  # the third feature is constant
        pooled = F.adaptive_avg_pool3d(x, 3).flatten(1)
        return torch.cat([1000 + pooled[:, :2], torch.ones_like(pooled[:, :1]), pooled[:, 2:]], 1)

    for space in (
        latent_space(vae, CROP, flips=(0,), shift=0),
        latent_space(vae, CROP, flips=(0,)),
        feature_space(extractor, volumes, CROP, flips=(0,)),
    ):
        found = similarity_matrix(copies, volumes, space)
        assert np.allclose(np.diag(found), 1, atol=1e-3) and found.argmax(1).tolist() == [0, 1, 2]
        assert (np.sort(found)[:, -2] < 0.95).all()


def test_intervals_and_thresholds_of_known_answers():
    assert wilson(0.0, 10) == pytest.approx([0, 0.2775], abs=1e-4)  # Wilson 1927: z^2 / (n + z^2)
    assert wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    scores = np.arange(19.0)
    assert conformal_threshold(scores, range(19), 0.05) == 18  # the largest of 19: a further one exceeds it once in 20
    assert conformal_threshold(scores, range(19), 0.1) == 17
    twice = np.repeat(scores, 2)
    assert conformal_threshold(twice, units_of(38, "s", 2), 0.1) == 17  # two volumes a subject are one unit
    with pytest.raises(ValueError, match="18 subjects.*alpha >= 0.0526"):
        conformal_threshold(scores[:18], range(18), 0.05)
    with pytest.raises(ValueError, match="alpha 0: take a fraction"):
        conformal_threshold(scores, range(19), 0.0)


def test_the_false_positive_rate_is_what_was_asked_for():
    random = np.random.default_rng(0)
    above, cross = [], []
    for _ in range(300):  # two volumes a subject that go together, so that 80 are but 40
        unseen = np.repeat(random.normal(size=40), 2) + 0.1 * random.normal(size=80)
        units = units_of(80, "s", 2)
        threshold = conformal_threshold(unseen, units, 0.1)
        above.append(np.mean(random.normal(size=50) * np.sqrt(1.01) > threshold))
    for seed in range(5):
        unseen = np.random.default_rng(seed).normal(size=39)
        cross.append(memorized(unseen, unseen, range(39), alpha=0.1)["false_positives"]["fraction"])
    assert 0.07 < np.mean(above) <= 0.105
    assert np.mean(cross) == pytest.approx(0.1, abs=0.03)


def test_subjects_at_the_threshold_are_not_memorized():
    """Scores 0 to 18 of 19 subjects: 17 is the threshold at 1 in 10. Of four subjects one and a half lie above it."""
    unseen, units = np.repeat(np.arange(19.0), 3), units_of(57, "u", 3)
    generated = np.array([17.0, 17.0, 18.0, 18.0, 19.0, 17.0, 5.0, 5.0])
    found = memorized(generated, unseen, units, alpha=0.1, generated_units=units_of(8, "g", 2))
    assert found["threshold"] == 17 and found["fraction"] == (0 + 1 + 0.5 + 0) / 4
    assert found["interval"] == wilson(found["fraction"], 4)  # of four subjects, not of eight volumes


def test_false_positives_use_the_threshold_of_other_subjects():
    """Of 20 subjects the highest exceeds all others, and no threshold that counts it as well."""
    unseen, units = np.repeat(np.arange(20.0), 2), units_of(40, "u", 2)
    found = memorized(np.array([30.0, 5.0]), unseen, units, alpha=0.05)
    assert found["false_positives"]["fraction"] == 0.05
    assert found["false_positives"]["interval"] == wilson(0.05, 20)
    assert found["fraction"] == 0.5 and found["excess"] == 0.45


def test_bootstrapped_thresholds_count_one_more_subject():
    """Of 10 subjects at alpha 0.1 the threshold is the highest resampled one: 0.6^10 = 0.6 % of resamples stay below
    5.5. By the second highest it would be 4.6 %, within the 95 % interval."""
    found = memorized(np.full(6, 5.5), np.arange(10.0), range(10), alpha=0.1)
    assert found["interval_drawn"] == [0, 0]


def test_areas_under_the_curve():
    low, high = np.arange(20.0), np.arange(20.0) + 100
    assert attack(high, low, range(20), range(20))["auc"] == 1
    assert attack(low, low, range(20), range(20))["auc"] == 0.5
    assert attack(np.array([1.0, 3.0]), np.array([2.0, 2.0, 3.0]), list("ab"), list("cde"))["auc"] == pytest.approx(
        2.5 / 6
    )
    # one subject of 19 volumes counts like one of a single volume
    assert attack(np.r_[high[:19], -1], low, ["a"] * 19 + ["b"], range(20))["auc"] == pytest.approx(0.5)
    found = attack(np.r_[high[:10], low[:10]], low, range(20), range(20))
    assert found["true_positives"] == {"0.01": 0.5, "0.1": 0.5}
    assert found["interval"][0] < found["auc"] < found["interval"][1]
    losses = loss_attack(low, high, range(20), range(20))  # members have the lower loss
    assert losses["auc"] == 1


def test_ratio_of_distances_looks_at_another_subject():
    similarity = np.array([[0.98, 0.97, 0.5], [0.6, 0.6, 0.6]])
    found = distance_ratio(similarity, ["a", "a", "b"])
    assert found == pytest.approx([np.sqrt(0.02 / 0.5), 1])
    with pytest.raises(ValueError, match="two subjects"):
        distance_ratio(similarity, ["a", "a", "a"])


def test_reidentification_of_planted_ranks():
    patients, count = units_of(40, "p", 2), 20
    similarity = np.zeros((count, 40))
    similarity[np.arange(count), 2 * np.arange(count) + 1] = 0.5  # the second volume of each patient
    sources = [patients[2 * i] for i in range(count)]
    found = reidentification(similarity, sources, patients)
    assert found["top_1"]["rate"] == 1 and found["top_1"]["chance"] == 0.05 and found["top_1"]["interval"][0] > 0.8
    similarity[:10, ::2] += 0.6  # ten sources are behind all others
    similarity[np.arange(10), 2 * np.arange(10)] = 0
    found = reidentification(similarity, sources, patients)
    assert found["top_1"]["rate"] == found["top_5"]["rate"] == 0.5 and found["top_5"]["chance"] == 0.25
    assert reidentification(np.zeros((count, 40)), sources, patients)["top_5"]["rate"] == 0  # ties tell nothing
    with pytest.raises(ValueError, match="nobody"):
        reidentification(similarity, ["nobody"] * count, patients)


def test_a_patient_is_as_near_as_its_nearest_volume():
    """Patient a: one volume alike, one not. Patient b: both less alike than a's first, but more than a's mean."""
    found = reidentification(np.array([[0.5, 0.0, 0.3, 0.3]]), ["a"], ["a", "a", "b", "b"])
    assert found["top_1"]["rate"] == 1


def test_similarity_to_the_volume_of_its_own_mask():
    random = np.random.default_rng(0)
    seen, unseen = 0.8 + 0.02 * random.normal(size=60), 0.7 + 0.02 * random.normal(size=40)
    found = own_mask(seen, units_of(60, "s", 2), unseen, units_of(40, "u", 2))
    assert found["difference"] == pytest.approx(0.1, abs=0.01)
    assert 0.08 < found["interval"][0] < found["difference"] < found["interval"][1] < 0.12
    alike = own_mask(unseen[:20], range(20), unseen[20:], range(20))
    assert alike["interval"][0] < 0 < alike["interval"][1]


@pytest.fixture(scope="module")
def real() -> tuple[VolumeSet, VolumeSet]:
    training, unseen = smooth(24, 10), smooth(48, 11)
    return (
        VolumeSet(training, units_of(24, "train"), units_of(24, "t", 2)),
        VolumeSet(unseen, units_of(48, "test"), units_of(48, "u", 2)),
    )


def test_copies_of_one_in_ten_are_found_at_that_rate(real):
    training, unseen = real
    volumes = smooth(40, 12)
    for index in range(4):
        volumes[10 * index] = disguised(training.volumes[5 * index], seed=index)
    names = units_of(40, "made")
    masks = ["train005" if name == "made010" else "test001" if name == "made001" else None for name in names]
    generated = VolumeSet(volumes, names, names, masks)
    report = privacy_report(training, unseen, generated, {"voxels": SPACE}, alpha=0.1, pairs=5)
    json.dumps(report)
    found = report["spaces"]["voxels"]
    ratio = found["memorized"]["ratio"]
    assert found["yoon_2023"]["fraction"] == 0.1 and found["yoon_2023"]["unseen"] == 0
    assert found["yoon_2023"]["unseen_interval"] == wilson(0.0, report["counts"]["unseen"]["units"])
    expected = 0.1 + 0.9 * 0.1  # the copies, and alpha of the others
    assert ratio["fraction"] >= 0.1 and ratio["interval"][0] <= expected <= ratio["interval"][1]
    similarity = found["memorized"]["similarity"]
    assert similarity["interval"][0] <= expected <= similarity["interval"][1] and similarity["threshold"] < 0.9
    closest = found["closest"]
    copied = {("made000", "train000"), ("made010", "train005"), ("made020", "train010"), ("made030", "train015")}
    assert {(pair["query"], pair["reference"]) for pair in closest[:4]} == copied
    assert closest[3]["similarity"] > 0.9 > closest[4]["similarity"]
    # made010 had the mask of the volume that it copies: apart from that volume it copies none
    assert found["memorized"]["other_masks"]["fraction"] == pytest.approx(similarity["fraction"] - 1 / 40)
    assert found["own_mask"]["training_masks"]["mean"] > 0.9 > found["own_mask"]["unseen_masks"]["mean"]
    figure = pairs_figure(closest[:2], generated, training, SPACE)
    assert closest[0]["query"] in figure.axes[0].get_ylabel()


def test_independent_volumes_are_not_found(real):
    training, unseen = real
    names = units_of(40, "made")
    generated = VolumeSet(smooth(40, 13), names, names)
    losses = np.ones(24), np.ones(48)
    report = privacy_report(training, unseen, generated, {"voxels": SPACE}, alpha=0.1, pairs=1, losses=losses)
    found = report["spaces"]["voxels"]
    for part in ("similarity", "ratio"):
        judged = found["memorized"][part]
        assert judged["interval"][0] <= 0.1 and judged["interval_drawn"][0] <= 0.1
        assert judged["nearer"]["interval"][0] < 0.5 < judged["nearer"]["interval"][1]
    auc = found["membership"]
    assert auc["interval"][0] < 0.5 < auc["interval"][1]
    assert report["loss_membership"]["auc"] == 0.5


def test_members_of_a_generator_that_copies_are_known(real):
    training, unseen = real
    names = units_of(24, "made")
    copies = VolumeSet([disguised(volume, i) for i, volume in enumerate(training.volumes)], names, names)
    anonymized = VolumeSet(copies.volumes[:6], names[:6], training.subjects[:6])
    report = privacy_report(training, unseen, copies, {"voxels": SPACE}, alpha=0.1, pairs=1, anonymized=anonymized)
    found = report["spaces"]["voxels"]
    assert found["membership"]["auc"] > 0.9 and found["memorized"]["similarity"]["fraction"] == 1
    assert found["reidentification"]["top_1"]["rate"] == 1 and found["reidentification"]["patients"] == 36


def test_members_are_told_by_similarity_and_loss_in_equal_sets(real):
    """Sides that changed places would say 0 instead of 1: copies are near to members, whose losses are the lower
    ones."""
    training, unseen = real[0], VolumeSet(real[1].volumes[:24], real[1].names[:24], real[1].subjects[:24])
    copies = VolumeSet([disguised(volume, i, noise=0.1) for i, volume in enumerate(training.volumes)])
    losses = np.linspace(0.1, 0.2, 24), np.linspace(0.153, 0.4, 24)
    report = privacy_report(training, unseen, copies, {"voxels": SPACE}, alpha=0.1, pairs=1, losses=losses)
    assert report["spaces"]["voxels"]["membership"]["auc"] == 1
    assert report["loss_membership"]["auc"] == pytest.approx((losses[0][:, None] < losses[1]).mean())
    assert report["loss_membership"]["auc"] > 0.85


def test_intervals_and_other_masks_go_by_subject(real):
    """40 volumes of 20 subjects; made010 copies one volume of the very subject whose other volume's mask it has."""
    training, unseen = real
    volumes = smooth(40, 12)
    volumes[10] = disguised(training.volumes[5], seed=1)
    volumes[20] = disguised(training.volumes[11], seed=2)
    assert training.subjects[4] == training.subjects[5] != training.subjects[11]
    masks: list[str | None] = [None] * 40
    masks[10], masks[20] = "train004", "train004"
    generated = VolumeSet(volumes, units_of(40, "made"), units_of(40, "s", 2), masks)
    found = privacy_report(training, unseen, generated, {"voxels": SPACE}, alpha=0.1, pairs=1)["spaces"]["voxels"]
    similarity, others = found["memorized"]["similarity"], found["memorized"]["other_masks"]
    assert others["fraction"] == pytest.approx(similarity["fraction"] - 1 / 40)  # made020 copies another subject
    assert similarity["interval"] == wilson(similarity["fraction"], 20)
    assert found["yoon_2023"]["fraction"] == 2 / 40 and found["yoon_2023"]["interval"] == wilson(2 / 40, 20)
    assert similarity["false_positives"]["interval"] == wilson(similarity["false_positives"]["fraction"], 24)


def test_subjects_on_both_sides_are_refused(real):
    training, _ = real
    with pytest.raises(ValueError, match="t000"):
        privacy_report(training, training, training, {"voxels": SPACE})


@pytest.mark.parametrize("block", [1, 2])
def test_copies_are_rejected_by_fingerprints(block):
    wide = (18, 18, 18)  # copies that move within it lose nothing of the crop
    training, unseen, fresh = smooth(12, 20, wide), smooth(24, 21, wide), smooth(6, 22, wide)
    check = CopyCheck.of(training, CROP, block=block, flips=(0,), shift=2)
    moved = np.roll(training[7], (2, -1, 1), (1, 2, 3))[:, ::-1] * 9 + 3
    found = check.check(moved)
    assert found.similarity == pytest.approx(1, abs=1e-5) and found.index == 7 and not found.copy  # no threshold yet
    check = check.calibrated(unseen, range(24), alpha=0.05)
    assert check.threshold == pytest.approx(max(check.check(volume).similarity for volume in unseen))
    assert check.check(moved).copy
    assert check.check(disguised(training[3], 1, noise=0.1))[::2] == (True, 3)
    assert sum(check.check(volume).copy for volume in fresh) <= 1


def test_fingerprints_are_kept_in_a_file_and_scans_are_not(tmp_path):
    volumes = smooth(3, 23)
    check = CopyCheck.of(volumes, CROP, block=4, flips=(1,), shift=1).calibrated(smooth(9, 24), range(9), alpha=0.1)
    check.save(tmp_path / "copies.safetensors")
    stored = CopyCheck.load(tmp_path / "copies.safetensors")
    assert (stored.crop, stored.flips, stored.threshold) == (CROP, (1,), check.threshold)
    assert stored.fingerprints.numel() == 3 * 27  # of 3 * 12^3 voxels
    assert stored.check(volumes[2]).similarity == pytest.approx(1, abs=1e-4) and stored.check(volumes[2]).copy
    with pytest.raises(ValueError, match="are the scans"):
        CopyCheck.of(volumes, CROP, block=1).save(tmp_path / "scans.safetensors")
    with pytest.raises(ValueError, match="multiple of the block"):
        CopyCheck.of(volumes, CROP, block=5)
    with pytest.raises(ValueError, match="2 channels, against 1"):
        stored.check(np.concatenate([volumes[0], volumes[0]]))
    save_file({"weights": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no fingerprints"):
        CopyCheck.load(tmp_path / "other.safetensors")
    for damage in ({"threshold": float("nan")}, {"fingerprints": stored.fingerprints * float("inf")}):
        dataclasses.replace(stored, **damage).save(tmp_path / "damaged.safetensors")
        with pytest.raises(ValueError, match="damaged.safetensors: its settings do not fit"):
            CopyCheck.load(tmp_path / "damaged.safetensors")
