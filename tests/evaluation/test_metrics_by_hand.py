"""Figures of copies, features and label shapes that a calculation by hand knows."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.copies.fingerprints import CopyCheck, default_crop
from evaluation.metrics.label_shapes import shape_figures, shape_names
from evaluation.metrics.nearest import standardized
from training import encoder_distance


def test_a_small_volume_of_odd_size_repeats_its_last_voxel():
    volume = np.array([0.0, 1, 3]).reshape(1, 3, 1, 1)
    found = CopyCheck.of([volume], (4, 1, 1), block=1).fingerprints.flatten()
    assert found.tolist() == pytest.approx(standardized(np.array([[0.0, 1, 3, 3]]))[0].tolist())


def test_a_shifted_copy_has_similarity_1_despite_a_flat_channel():
    """The best placement counts, and a constant channel has no part in it."""
    volume = np.random.default_rng(0).random((2, 6, 6, 6))
    volume[1] = 0.5
    check = CopyCheck.of([volume], (4, 4, 4), block=2, shift=1)
    assert check.check(volume).similarity == pytest.approx(1, abs=1e-5)


def test_the_default_crop_leaves_the_shift_at_both_ends():
    assert default_crop([(1, 12, 13, 14)], block=2, shift=2) == (8, 8, 10)


def test_what_varies_by_rounding_alone_is_constant():
    values = np.array([[0.3, 0.1 + 0.2, 0.3, 0.1 + 0.2], [0, 2, 0, 2]])
    assert values[0, 0] != values[0, 1]
    assert standardized(values).tolist() == [[0, 0, 0, 0], [-1, 1, -1, 1]]


class _Itself(nn.Module):
    """A network of stride 2 whose one level is its input."""

    stride = 2

    def __init__(self, vae: object):
        super().__init__()

    def forward(self, volumes: Tensor) -> list[Tensor]:
        return [volumes]


def test_padding_is_no_part_of_the_encoders_statistics(monkeypatch):
    """Three planes of 1 and one of padding, at -1: the mean is 1 and the deviation 0."""
    monkeypatch.setattr(encoder_distance, "EncoderFeatures", _Itself)
    extractor = encoder_distance.EncoderStatistics(None)  # type: ignore[arg-type]
    assert extractor(torch.ones(1, 1, 3, 2, 2))[0].tolist() == pytest.approx([1, 0], abs=1e-6)


def test_centers_of_labels_are_apart_in_millimeters():
    channels = np.zeros((2, 1, 1, 3))
    channels[0, 0, 0, 0] = channels[1, 0, 0, 2] = 1
    figures = dict(zip(shape_names(["a", "b"]), shape_figures(channels, (1, 1, 3)), strict=True))
    assert figures["a, b distance"] == pytest.approx(6)


def test_faces_at_the_border_belong_to_the_surface():
    channels = np.zeros((1, 4, 4, 4))
    channels[0, :2, :2, :2] = 1
    figures = dict(zip(shape_names(["a"]), shape_figures(channels, (1, 1, 1)), strict=True))
    assert figures["a surface"] == pytest.approx(24)


def test_roughness_is_a_fraction_of_the_label():
    """A Gaussian of one voxel takes a single voxel away: all of it."""
    channels = np.zeros((1, 5, 5, 5))
    channels[0, 2, 2, 2] = 1
    figures = dict(zip(shape_names(["a"]), shape_figures(channels, (1, 1, 1)), strict=True))
    assert figures["a roughness"] == pytest.approx(1)
