"""Parts of the pipelines whose answer is known by hand: limits of an edit, how it is joined, regions, types, spacings,
hashes."""

import hashlib

import numpy as np
import pytest
import torch
from tiny import labels_of, tiny_data

from pipelines import VolumeProcessor
from pipelines.inputs.images import GivenImage
from pipelines.inputs.inpainting import (
    EditRequest,
    PreparedEdit,
    downsample_region,
    harmonic_blend,
)
from pipelines.storage.provenance import recorded_guidance, tensor_digest
from pipelines.volume_processor import whole_or_float
from volumes import LinearScale, Volume

STRIDE = (4, 4, 4)


def edit_of(
    original: np.ndarray, scale: LinearScale, region: np.ndarray | None = None, margin: float = 4.0
) -> PreparedEdit:
    image = GivenImage(Volume(original[None].astype(np.float32), np.eye(4)), scale)
    unseen = np.zeros(original.shape, bool)
    return PreparedEdit({"MR": image}, {"MR": original}, region, (1.0, 1.0, 1.0), margin, unseen)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "scale", "limits"),
    [
        (150, 200, np.int16, (100, 300), (100, 300)),  # what the model makes reaches beyond the image
        (-50, 400, np.int16, (100, 300), (-50, 400)),  # the image reaches beyond what the model makes
        (0, 200, np.uint8, (-1000, 1000), (0, 255)),  # and neither beyond the type
        (0, 200, np.float32, (-1000, 1000), (-1000, 1000)),
    ],
)
def test_an_edit_stays_within_the_image_its_scale_and_its_type(low, high, dtype, scale, limits):
    original = np.full((2, 2, 2), low, dtype)
    original[0, 0, 0] = high
    edit = edit_of(original, LinearScale(*scale))
    assert edit.limits == {"MR": limits}
    (limited,) = edit.composited([np.array([-5000.0, 5000.0, 0, 0, 0, 0, 0, 0]).reshape(1, 2, 2, 2)], ["MR"])
    assert (limited.min(), limited.max()) == limits


@pytest.mark.parametrize("cuts", [[9], [1, 2, 3, 4, 5, 6, 7, 8], [4, 6]])
def test_what_is_made_meets_what_stays_however_it_is_cut(cuts):
    """Made is 0 and 10 stays. Two voxels inside one face: the first has most of the 10 (a straight line says 8), and
    beyond the margin there is nothing of it."""
    region = np.zeros((7, 7, 14), bool)
    region[..., 4:] = True
    made = np.zeros((1, 7, 7, 14), np.float32)
    edit = edit_of(np.full((7, 7, 14), 10, np.float32), LinearScale(0, 20), region)
    slabs = list(edit.composited(np.split(made, cuts, axis=3), ["MR"]))
    joined = np.concatenate(slabs, axis=3)[0, 3, 3]
    np.testing.assert_allclose(joined, [10, 10, 10, 10, 8, 6, 4, 2, 0, 0, 0, 0, 0, 0], atol=0.1)


def test_a_membrane_needs_a_margin_of_one_voxel_along_one_axis():
    region = np.zeros((6, 3, 3), bool)
    region[2:] = True
    missing = np.where(region, 0, 9.0)[None].astype(np.float32)
    assert harmonic_blend(missing, region, (1, 1, 3), 2.0)[0, 2, 1, 1] > 3
    assert not harmonic_blend(missing, region, (1, 1, 3), 0.9).any()


def test_a_cell_belongs_to_a_region_that_reaches_it():
    region = np.zeros((8, 4, 12), bool)
    region[4, 3, 11] = True
    expected = torch.zeros(1, 1, 2, 1, 3, dtype=torch.bool)
    expected[0, 0, 1, 0, 2] = True
    assert torch.equal(downsample_region(region, STRIDE), expected)


def test_a_region_of_one_fine_voxel_survives_resampling():
    """An eighth of a voxel of the model; more than half of none."""
    affine = np.diag([0.5, 0.5, 0.5, 1.0])
    image = Volume(np.random.default_rng(0).uniform(100, 300, (1, 16, 16, 16)).astype(np.float32), affine)
    region = np.zeros((16, 16, 16), np.uint8)
    region[6, 7, 8] = 1
    processor = VolumeProcessor(tiny_data(intensity=[{"kind": "window", "low": 0, "high": 400}]), STRIDE)
    with pytest.warns(UserWarning, match="resampled"):
        prepared = processor.preprocess_edit(EditRequest({"MR": image}, region=region), None)
    assert prepared.edit is not None and prepared.edit.region is not None
    found = processor.padded_region(prepared, prepared.edit.region)
    assert found.shape == (8, 8, 8) and found[3, 3, 4] and found.sum() <= 27


@pytest.mark.parametrize(("spacing", "resampled"), [((1, 1, 1.005), False), ((1, 1, 1.1), True), ((1, 2, 1), True)])
def test_every_axis_decides_whether_a_mask_is_resampled(spacing, resampled, recwarn):
    mask = Volume(labels_of((9, 9, 9))[None], np.diag([*spacing, 1.0]))
    prepared = VolumeProcessor(tiny_data(), STRIDE).preprocess(mask)
    assert (
        (prepared.grid is not prepared.target) == resampled == any("resampled" in str(w.message) for w in recwarn.list)
    )


def test_a_size_below_those_of_training_warns_too():
    with pytest.warns(UserWarning, match="grid of 4 x 8 x 8 voxels .* 8 x 8 x 8 to 16 x 16 x 16"):
        VolumeProcessor(tiny_data(), STRIDE).preprocess(labels_of((3, 8, 8)))


@pytest.mark.parametrize(
    ("kind", "low", "high", "dtype"),
    [
        ("window", -1000, 1000, np.int16),
        ("window", 0, 256, np.int16),
        ("window", 0, 255, np.float32),  # rounding loses something
        ("window", 0.5, 1000, np.float32),
        ("window", 0, 999.5, np.float32),
        ("window", 0, 40000, np.float32),
        ("window", -40000, 0, np.float32),
        ("percentile", -1000, 1000, np.float32),
    ],
)
def test_whole_units_are_int16_where_rounding_loses_nothing(kind, low, high, dtype):
    assert whole_or_float([(kind, LinearScale(low, high))]) == dtype


def test_guidance_that_is_none_is_recorded_as_none():
    assert [recorded_guidance(scale) for scale in (None, 0.5, 1, 1.0, 2.0)] == [None, None, None, None, 2.0]
    assert recorded_guidance({"sex": 3.0}) == {"sex": 3.0}


def test_a_hash_is_of_name_type_shape_and_bytes():
    tensor = torch.arange(6.0)
    digests = []
    for key, one in (
        ("a", tensor),
        ("a", tensor.reshape(2, 3)),
        ("b", tensor),
        ("a", tensor.view(torch.int32)),
        ("a", -tensor),
    ):
        digest = hashlib.sha256()
        tensor_digest(digest, key, one)
        digests.append(digest.hexdigest())
    assert len(set(digests)) == 5
