"""Figures of the studies on a few numbers whose answer is known by hand."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from planted_volumes import plant
from shifted_coder import ShiftedCoder

from evaluation import evaluate_reconstruction
from evaluation.studies.class_adherence import compare_class_rates
from evaluation.studies.realism import VolumeSet, compare_features, measure_realism
from evaluation.studies.sampler_figures import SamplerScorer, inputs_from_dataset
from volumes import DataConfig, PhantomConfig, Volume, VolumeDataset, load_cases

SIDE = 24


def label_maps(folder, count: int) -> VolumeDataset:
    """The lower half of each is a gland."""
    array = np.zeros((SIDE, SIDE, SIDE), np.uint8)
    array[: SIDE // 2] = 1
    for number in range(count):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"v{number}.nii.gz")
    config = DataConfig(
        root=str(folder), images="*.nii.gz", image_labels={0: "outside", 1: "gland"}, validation_fraction=0
    )
    return VolumeDataset(load_cases(config), config)


class PerVolume(ShiftedCoder):
    """Gives back `change(image, how many volumes went before)`."""

    def __init__(self, change):
        super().__init__(0.0)
        self.change, self.seen = change, 0

    def decode(self, latents):
        self.seen += 1
        return SimpleNamespace(sample=self.change(latents.clone(), self.seen - 1))


def test_a_label_that_is_less_than_half_there_is_background(tmp_path):
    """What is outside comes back as 0.3 of a gland, in [0, 1]."""
    dice = evaluate_reconstruction(ShiftedCoder(-0.6), label_maps(tmp_path, 1))["dice"]
    assert dice == {"gland": {"volumes": 1, "mean": 1.0, "lowest": 1.0}}


def test_the_lowest_dice_is_that_of_the_worst_volume(tmp_path):
    """The second volume comes back with half of its gland: 2 * 1/2 / (1/2 + 1)."""

    def halve(image, before):
        if before == 1:
            image[..., : SIDE // 2] = -1
        return image - 0.02

    dice = evaluate_reconstruction(PerVolume(halve), label_maps(tmp_path, 2))["dice"]["gland"]
    assert dice == {"volumes": 2, "mean": pytest.approx(5 / 6), "lowest": pytest.approx(2 / 3)}


def test_psnr_spreads_by_its_standard_deviation():
    """Errors of 0.01 and 0.1 in [0, 1] are 40 and 20 dB: 30 with a standard deviation of 10."""
    config = DataConfig(phantom=PhantomConfig(count=2, shape=(SIDE, SIDE, SIDE)), validation_fraction=0)
    dataset = VolumeDataset(load_cases(config), config)
    for index in range(2):  # clipped, so that nothing is clamped
        plant(dataset, index, lambda case: np.clip(case.image.array, -0.7, 0.7, out=case.image.array))
    found = evaluate_reconstruction(PerVolume(lambda image, before: image - (0.02, 0.2)[before]), dataset)["psnr_db"]
    assert (found["mean"], found["std"]) == (pytest.approx(30, abs=1e-3), pytest.approx(10, abs=1e-3))


def test_classes_without_real_volumes_are_not_in_balanced_rates():
    """Two of three classes are tested: of the first all are right, of the second half of the real and none of the
    made."""
    real, made = np.array([1.0, 1, 1, 0]), np.array([1.0, 0])
    found = compare_class_rates(real, np.array([0, 0, 1, 1]), made, np.array([0, 1]), ["a", "b", "never"])
    assert (found["real"]["balanced"], found["generated"]["balanced"]) == (0.75, 0.5)
    assert found["difference_points"]["balanced"] == -25


def test_spectra_of_both_sets_are_compared_with_the_test_set():
    """A tenth of the amplitude is -20 dB, half of it -6.02 dB."""
    volume = np.random.default_rng(0).uniform(0, 1, (1, SIDE, SIDE, SIDE))
    amplitudes = {"training": 0.5, "test": 1.0, "generated": 0.1}
    sets = {name: VolumeSet([0.5 + a * (volume - 0.5)] * 4) for name, a in amplitudes.items()}
    found = measure_realism(sets, {}, parts=["intensity"])["intensity"]["image"]["spectrum_db"]
    bands = len(found["bands"])
    assert found["generated_over_test"]["mean"] == pytest.approx([-20] * bands, abs=1e-6)
    assert found["training_over_test"]["mean"] == pytest.approx([20 * np.log10(0.5)] * bands, abs=1e-6)


def test_a_feature_that_hardly_varies_does_not_drown_the_others():
    """Deviations of 1 and 1e-6 have a root mean square of 1 / sqrt(2), of which the second counts as a tenth: a shift
    of 0.1 there is sqrt(2) of that, squared 2."""
    rows = np.tile([[1, 1e-6], [1, -1e-6], [-1, 1e-6], [-1, -1e-6]], (2, 1))
    found = compare_features({"training": rows, "test": rows, "generated": rows + np.array([0, 0.1])})
    assert found["frechet"]["whole"] == pytest.approx(2, rel=1e-5)


def test_a_class_that_is_not_known_is_not_asked_for():
    def facts(index: int) -> SimpleNamespace:
        return SimpleNamespace(mask=True, classes=[index], numbers=[])

    dataset = SimpleNamespace(
        labels={0: "background", 2: "anterior"},
        facts=[facts(0), facts(-1)],
        label_map=lambda index: Volume(np.zeros((1, 2, 2, 2), np.int16), np.eye(4)),
        config=SimpleNamespace(classes={"sex": ["f", "m"]}, class_names={"sex": ["f", "m"]}, numbers=[]),
        cases=[SimpleNamespace(name=name, subject=name) for name in "ab"],
    )
    unet = SimpleNamespace(config={"num_labels": 2, "classes": {"sex": ["f", "m"]}, "numbers": {}})
    assert inputs_from_dataset(dataset, unet).classes == [{"sex": "f"}, {}]


class Says(torch.nn.Module):
    """A segmenter that sees the label that the intensity says."""

    def __init__(self):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.arange(3.0).view(1, 3, 1, 1, 1))

    def forward(self, images):
        return -((images - self.levels) ** 2)


def test_the_dice_of_a_volume_is_the_mean_over_its_labels():
    """Label 1 is found, label 2 is missed, in the first volume; in the second both are found."""
    labels = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 2]]).view(2, 4, 1, 1)
    seen = torch.tensor([[0.0, 1, 1, 0], [0, 1, 2, 2]]).view(2, 1, 4, 1, 1)
    judge = SamplerScorer.__new__(SamplerScorer)
    judge.segmenter, judge.num_labels, judge.pairs = Says(), 3, SimpleNamespace(labels=labels)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        assert judge._dice(seen).tolist() == [[0.5, 1.0]]
