"""Parts of evaluation whose answer is known without a training: similarities, scores of planted predictions, what a
step sees."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted_volumes import plant
from shifted_coder import ShiftedCoder
from torch import nn

from evaluation import evaluate_reconstruction
from evaluation.metrics.fidelity import mean_gradient
from evaluation.metrics.memorization import distance_ratio
from evaluation.metrics.nearest import (
    Space,
    crop_of,
    feature_space,
    latent_space,
    similarity_matrix,
    standardized,
)
from evaluation.metrics.set_distances import compare_sets
from evaluation.networks import classifier as classifier_module
from evaluation.networks.segmenter import volume_dice
from evaluation.stats.bootstrap import resample_weights
from evaluation.studies.training_result import Scores
from evaluation.studies.utility import score_segmenter
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases

RANDOM = np.random.default_rng(0)


# similarities


def test_a_constant_volume_stays_zero_whatever_its_rounding():
    for value in (0.1, 1 / 3, 7.7, 1e6 + 0.1, -3e-8):
        assert not standardized(np.full((2, 3, 5, 7), value)).any()


def test_a_channel_that_is_constant_says_nothing():
    volume = RANDOM.normal(size=(2, 8, 8, 8))
    volume[1] = 3
    for shift in (0, 1):
        assert similarity_matrix([volume], [volume], Space((8, 8, 8), shift=shift)).item() == pytest.approx(1, abs=1e-5)


def test_what_a_small_volume_lacks_is_its_lowest_value():
    volume = np.full((1, 2, 2, 2), 9.0)
    volume[0, 0, 0, 0] = 5
    cropped = crop_of(volume, (4, 4, 4))
    assert cropped.sum() == 9 * 7 + 5 * (64 - 7)


def test_features_count_equally_and_constant_ones_not_at_all():
    """The scale of a feature does not matter."""
    volumes = [RANDOM.normal(size=(1, 8, 8, 8)) for _ in range(6)]

    def features(scales):
        def extract(batch: torch.Tensor) -> torch.Tensor:
            found = [batch[:, 0, i].mean((1, 2)) * scale for i, scale in enumerate(scales)]
            return torch.stack([*found, torch.full_like(found[0], 5.0)], 1)

        return extract

    spaces = [feature_space(features(scales), volumes, (8, 8, 8)) for scales in ([1] * 8, [1, 1000] * 4)]
    first, second = (similarity_matrix(volumes, volumes, space) for space in spaces)
    np.testing.assert_allclose(first, second, atol=1e-4)
    np.testing.assert_allclose(np.diag(first), 1, atol=1e-5)


def test_the_autoencoder_is_given_intensities_from_minus_1_to_1():
    seen = []

    def encode(images):
        seen.append(images)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images))

    vae = SimpleNamespace(stride=(4, 4, 4), dtype=torch.float32, device=torch.device("cpu"), encode=encode)
    space = latent_space(vae, (6, 8, 8))  # pyright: ignore[reportArgumentType]
    volumes = torch.rand(1, 1, 6, 8, 8)
    assert space.embed is not None
    maps = space.embed(volumes)
    assert maps.shape == (1, 1, 8, 8, 8)
    torch.testing.assert_close(maps[:, :, 1:7], 2 * volumes - 1)
    assert (maps[:, :, [0, 7]] == -1).all()


def test_where_two_subjects_are_equally_near_the_ratio_is_1():
    assert distance_ratio(np.array([[1.0, 1.0], [1.0, 0.5]]), ["a", "b"]).tolist() == [1, 0]


# distances and draws


def test_excess_is_the_distance_beyond_that_of_training():
    """Distances are from unseen volumes, and the floor is that of training volumes."""
    sets = {"training": np.full((8, 1), 10.0), "test": np.zeros((6, 1)), "generated": np.full((9, 1), 3.0)}
    found = compare_sets(lambda a, b: abs(a.mean() - b.mean()), sets, subsets=3)
    means = {name: found[name]["mean"] for name in ("generated_to_test", "training_to_test", "test_halves", "excess")}
    assert means == {"generated_to_test": 3, "training_to_test": 10, "test_halves": 0, "excess": -7}
    assert found["count"] == 3 and found["whole"] == 3


def test_resampled_subjects_weigh_equally_whatever_their_counts():
    draws = resample_weights(["a", "a", "a", "b"], np.random.default_rng(0))
    np.testing.assert_allclose(draws.sum(1), 2)
    assert (draws[:, 0] == draws[:, 2]).all() and set(draws[:, 3]) == {0, 1, 2}


# reconstructions


def test_sharpness_is_a_ratio_of_sums_over_all_volumes():
    """The first volume, ten times as flat as the others, comes back without any edge: that counts a tenth of what it
    would."""
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(28, 36, 28)), validation_fraction=0)
    dataset = VolumeDataset(load_cases(config), config)
    plant(dataset, 0, lambda case: np.multiply(case.image.array, 0.1, out=case.image.array))

    class Forgetful(ShiftedCoder):
        def decode(self, latents):
            return SimpleNamespace(sample=latents * (latents.abs().max() > 0.5))

    gradients = [mean_gradient((dataset[i]["image"].numpy() + 1) / 2) for i in range(3)]
    found = evaluate_reconstruction(Forgetful(0.0), dataset)  # pyright: ignore[reportArgumentType]
    assert found["sharpness"] == pytest.approx(sum(gradients[1:]) / sum(gradients), rel=1e-4)


# scores


class Planted(nn.Module):
    """Predicts the labels that the images hold, and background for those in `never`."""

    def __init__(self, *never: int):
        super().__init__()
        self.never, self.weight = never, nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        labels = images[:, 0].long()
        for label in self.never:
            labels = labels.masked_fill(labels == label, 0)
        return F.one_hot(labels, 3).movedim(-1, 1).float()


def planted_labels(count: int) -> torch.Tensor:
    labels = torch.zeros(count, 8, 8, 8, dtype=torch.uint8)
    for index in range(count):  # each elsewhere
        labels[index, index % 4 : index % 4 + 2, index // 4, :3] = 1
        labels[index, 6:, index // 4, index % 4] = 2
    return labels


def test_each_volume_is_judged_by_its_own_labels_in_any_batch():
    labels = planted_labels(11)
    for rows in (volume_dice(Planted(), labels[:, None].float(), labels, 3, batch_size=size) for size in (4, 8, 11)):
        assert [row.tolist() for row in rows] == [[1.0] * 11] * 2


def test_scores_are_means_over_labels_and_over_volumes():
    labels = planted_labels(9)
    judge = SimpleNamespace(images=labels[:, None].float(), labels=labels)
    found = score_segmenter(Planted(2), judge, 3, None)  # pyright: ignore[reportArgumentType]
    assert found == Scores(0.5, [1.0, 0.0], [0.5] * 9)


# what a classifier's training sees


def test_every_class_and_every_volume_of_it_is_seen_and_moved(monkeypatch):
    """Of 2 and 6 volumes each class makes half of the batches; each volume is one bright voxel, of its own
    brightness."""
    images = torch.zeros(8, 1, 16, 16, 16)
    for index in range(8):
        images[index, 0, 8, 8, 8] = 10 * (index + 1)
    classes, seen = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]), []
    forward = classifier_module.VolumeClassifier.forward
    monkeypatch.setattr(
        classifier_module.VolumeClassifier, "forward", lambda self, batch: seen.append(batch) or forward(self, batch)
    )
    classifier_module.train_classifier(images, classes, 2, seed=0, iterations=12)
    batches = torch.cat(seen)
    volumes = (batches.amax((1, 2, 3, 4)) / 10).round().long() - 1
    assert set(volumes.tolist()) == set(range(8))
    assert 0.4 < (volumes < 2).float().mean() < 0.6
    places = np.array(np.unravel_index(batches.flatten(1).argmax(1).numpy(), (16, 16, 16)))
    assert places.min() == 5 and places.max() == 11  # 3 voxels each way
