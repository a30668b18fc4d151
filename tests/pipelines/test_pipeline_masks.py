"""Masks going in: what is refused, translated, resampled or warned of. No model runs here."""

import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from structures import on_slice, rtstruct, series_of
from tiny import labels_of, mask_image, tiny_data

from cli.generation import label_pair
from pipelines import VolumeProcessor, describe_mask
from volumes import PADDING, Volume, VolumeError

STRIDE = (4, 4, 4)


@pytest.fixture
def processor():
    return VolumeProcessor(tiny_data(), STRIDE)


def test_values_become_indices_and_the_rest_is_padding(processor):
    """Files hold 0, 2 and 5; the model sees 0, 1 and 2, and -1 around the 7 x 6 x 5 voxels of the mask."""
    labels = labels_of((7, 6, 5))
    prepared = processor.preprocess(nib.Nifti1Image(labels, np.eye(4)))
    assert prepared.shape == prepared.labels.shape == (8, 8, 8)
    expected = np.full((8, 8, 8), PADDING)
    expected[0:7, 1:7, 1:6] = np.select([labels == 2, labels == 5], [1, 2], 0)
    np.testing.assert_array_equal(prepared.labels, expected)


def test_unknown_labels_are_named_with_known_ones_and_remedy(processor, tmp_path):
    labels = labels_of((8, 8, 8))
    labels[0, 0, 0], labels[1, 0, 0] = 1, 9
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "case.nii.gz")
    with pytest.raises(ValueError) as error:
        processor.preprocess(tmp_path / "case.nii.gz")
    for part in ("case.nii.gz", "[1, 9]", "0 = background, 2 = anterior, 5 = posterior", "label_map", "--label_map"):
        assert part in str(error.value)


@pytest.mark.parametrize("label_map", [{1: 2, 9: 5}, {1: "anterior", 9: "posterior"}])
def test_a_label_map_translates_by_value_and_by_name(processor, label_map):
    labels = labels_of((8, 8, 8))
    other = np.select([labels == 2, labels == 5], [1, 9], 0).astype(np.int16)
    prepared = processor.preprocess(nib.Nifti1Image(other, np.eye(4)), label_map)
    np.testing.assert_array_equal(prepared.labels, processor.preprocess(nib.Nifti1Image(labels, np.eye(4))).labels)


def test_a_label_map_is_applied_once(processor):
    """2 -> 5 and 5 -> 2 swap the two; neither is translated twice."""
    labels = labels_of((8, 8, 8))
    swapped = processor.preprocess(mask_image((8, 8, 8)), {2: 5, 5: 2}).labels
    np.testing.assert_array_equal(swapped, np.select([labels == 2, labels == 5], [2, 1], 0))


def test_a_label_map_to_nowhere_is_refused(processor):
    with pytest.raises(ValueError, match=r"label_map leads to \['tumor'\].*0 \(background\), 2 \(anterior\)"):
        processor.preprocess(mask_image((8, 8, 8)), {3: "tumor"})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((0, 8, 8), dtype=np.int16), "is empty, it has no voxels"),
        (np.full((8, 8, 8), PADDING), "is empty, all its voxels are marked as missing"),
        (np.full((8, 8, 8), 0.5), "not int16 labels"),
        (np.full((8, 8, 8), np.nan), "not int16 labels"),
        (np.full((8, 8, 8), 40000), "not int16 labels"),
        (torch.zeros(2, 8, 8, 8), "give several masks as a list"),
        (np.zeros((8, 8)), "expected"),
        ({"mask": 1}, "got dict"),
        (Volume(labels_of((4, 5, 6))[None], np.diag([-1.0, -1, 1, 1])), "its axes run LPS, a Volume's run RAS"),
        ("nowhere.nii.gz", "nowhere.nii.gz: no such file"),
    ],
)
def test_what_is_no_mask_is_refused(processor, mask, message):
    with pytest.raises(ValueError, match=message):
        processor.preprocess(mask)


def test_minus_one_is_a_label_where_the_model_has_it():
    mask = np.zeros((4, 4, 4), dtype=np.int16)
    mask[2:] = -1
    prepared = VolumeProcessor(tiny_data(labels={"-1": "air", "0": "body"}), STRIDE).preprocess(mask)
    np.testing.assert_array_equal(prepared.labels, mask + 1)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_hash_of_a_pair_is_of_both_files(tmp_path, suffix):
    """Masks of one shape share their header: by it alone, an interrupted run would take another mask's volume for
    done."""
    header, hashes = tmp_path / f"mask.hdr{suffix}", []
    for seed in (0, 1):
        nib.save(nib.Nifti1Pair(labels_of((4, 5, 6), seed), np.eye(4)), tmp_path / f"mask.img{suffix}")
        hashes.append((describe_mask(header)["sha256"], describe_mask(tmp_path / f"mask.img{suffix}")["sha256"]))
    assert hashes[0][0] == hashes[0][1] != hashes[1][0] == hashes[1][1]


def test_background_everywhere_warns(processor):
    with pytest.warns(UserWarning, match="is background everywhere"):
        processor.preprocess(np.zeros((8, 8, 8), dtype=np.int16))


def test_a_size_outside_of_training_warns(processor, recwarn):
    processor.preprocess(mask_image((16, 5, 6)))
    processor.preprocess(mask_image((13, 13, 13)))  # padded to 16, as the largest in training
    assert not recwarn.list
    with pytest.warns(UserWarning, match="grid of 20 x 8 x 8 voxels .* 8 x 8 x 8 to 16 x 16 x 16"):
        processor.preprocess(mask_image((17, 8, 8)))


def test_missing_voxels_get_the_lowest_value(processor):
    labels = labels_of((8, 8, 8))
    labels[:3] = PADDING
    prepared = processor.preprocess(nib.Nifti1Image(labels, np.eye(4)))
    assert (prepared.labels[:3] == PADDING).all() and (prepared.labels[3:] >= 0).all()
    volume = processor.postprocess(torch.zeros(1, 8, 8, 8), prepared, "np")
    assert (volume[0, :3] == 100).all() and (volume[0, 3:] == 200).all()


@pytest.mark.parametrize("spacing", [2.0, 0.6, (0.7, 1.0, 1.9)])
def test_another_spacing_is_resampled_and_back_again(processor, spacing):
    """The canvas has the model's 1 mm; the result has the mask's grid, and a constant stays constant up to its edges.
    What fills voxels from outside would be the lowest value, that of a corner far away."""
    affine = np.diag([*np.broadcast_to(spacing, 3), 1.0])
    affine[:3, 3] = -30, 12, 5
    mask = nib.Nifti1Image(labels_of((13, 11, 7)), affine)
    with pytest.warns(UserWarning, match="the model was trained at 1 x 1 x 1 mm; the mask is resampled"):
        prepared = processor.preprocess(mask)
    np.testing.assert_allclose(prepared.grid.spacing, 1)
    np.testing.assert_allclose(prepared.grid.shape, np.array(mask.shape) * spacing, atol=0.51)
    for corner, opposite in ((0, -1), (-1, 0)):
        grid = np.full((1, *prepared.grid.shape), 0.5, np.float32)
        grid[0, corner, corner, corner] = -1
        image = processor.postprocess(torch.from_numpy(prepared.placement.apply(grid, 0.9)), prepared)
        assert image.shape == mask.shape
        np.testing.assert_allclose(image.affine, affine)
        values = np.asarray(image.dataobj)
        assert values[corner, corner, corner] < 240
        for axis in range(3):
            np.testing.assert_allclose(values.take(opposite, axis), 250, rtol=1e-5)


def test_resampling_there_and_back_keeps_anatomy_in_place(processor):
    """A ramp in millimeters painted on the 1 mm canvas comes back as the same millimeters on the mask's 2 mm grid."""
    affine = np.diag([-2.0, 2, 2, 1])  # stored right to left
    affine[:3, 3] = 20, -6, 4
    with pytest.warns(UserWarning, match="resampled"):
        prepared = processor.preprocess(nib.Nifti1Image(labels_of((7, 6, 6)), affine))
    i = np.arange(prepared.grid.shape[0])
    ramp = (prepared.grid.affine[0, 0] * i + prepared.grid.affine[0, 3]) / 100  # world x / 100
    painted = np.broadcast_to(ramp[:, None, None], prepared.grid.shape).astype(np.float32)
    image = processor.postprocess(torch.from_numpy(prepared.placement.apply(painted, 0)[None]), prepared)
    world = affine[0, 0] * np.arange(7) + affine[0, 3]
    inner = slice(1, -1)  # the smoothing before going coarser reaches the edge
    np.testing.assert_allclose(np.asarray(image.dataobj)[inner, 3, 3], 200 + world[inner], atol=0.05)


@pytest.mark.parametrize("codes", ["RAS", "PIL"])
def test_an_oblique_mask_of_another_spacing_goes_there_and_back(processor, codes):
    """Each voxel of the 1 mm canvas has the label of the mask's voxel that holds its center; a function that is linear
    in the place, painted on the canvas, is the same function of the place on the mask's grid."""
    cos, sin = np.cos(0.3), np.sin(0.3)
    turned = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned * [2.0, 1.5, 1.2], [20, -6, 4]
    labels = np.repeat(np.repeat(np.repeat(labels_of((3, 4, 4)), 4, 0), 3, 1), 3, 2)  # blocks of 12 x 12 x 12 voxels
    image = nib.Nifti1Image(labels, affine)
    to = nib.orientations.axcodes2ornt(codes)
    stored = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), to))
    with pytest.warns(UserWarning, match="resampled"):
        prepared = processor.preprocess(stored)
    place = nib.affines.apply_affine(prepared.grid.affine, np.moveaxis(np.indices(prepared.grid.shape), 0, -1))
    voxel = nib.affines.apply_affine(np.linalg.inv(affine), place)
    nearest = np.rint(voxel).astype(int).clip(0, np.array(labels.shape) - 1)
    indices = np.select([labels == 2, labels == 5], [1, 2], 0)[tuple(np.moveaxis(nearest, -1, 0))]
    clear = (np.abs(np.abs(voxel - np.floor(voxel)) - 0.5) > 1e-3).all(-1)  # not halfway between two voxels
    np.testing.assert_array_equal(prepared.grid.array[0][clear], indices[clear])
    painted = ((place - place.mean((0, 1, 2))) @ [0.02, -0.03, 0.01]).astype(np.float32)
    assert np.abs(painted).max() < 0.9
    image = processor.postprocess(torch.from_numpy(prepared.placement.apply(painted[None], 0)), prepared)
    np.testing.assert_allclose(image.affine, stored.affine, atol=1e-5)
    inner = np.asarray(nib.as_closest_canonical(image).dataobj)[2:-2, 2:-2, 2:-2]
    at = nib.affines.apply_affine(affine, np.moveaxis(np.indices(labels.shape), 0, -1))[2:-2, 2:-2, 2:-2]
    np.testing.assert_allclose(inner, 200 + 100 * (at - place.mean((0, 1, 2))) @ [0.02, -0.03, 0.01], atol=0.05)


def test_a_model_of_native_spacing_takes_any(recwarn):
    processor = VolumeProcessor(tiny_data(spacing=None), STRIDE)
    prepared = processor.preprocess(nib.Nifti1Image(labels_of((8, 8, 8)), np.diag([3.0, 3, 3, 1])))
    assert prepared.grid is prepared.target and not recwarn.list


def test_an_array_lies_on_the_template(processor):
    prepared = processor.preprocess(labels_of((8, 8, 8)))
    np.testing.assert_array_equal(prepared.target.affine, tiny_data().affine)
    volume = Volume(labels_of((8, 8, 8))[None], np.diag([1.0, 1, 1, 1]))
    np.testing.assert_array_equal(processor.preprocess(volume).target.affine, np.eye(4))


def test_a_structure_set_is_read_by_the_names_of_labels(processor, tmp_path):
    """On the grid of its series; the command line has the same names."""
    image = Volume(np.zeros((1, 20, 24, 16), np.int16), np.eye(4))
    slices = series_of(image, tmp_path / "ct")
    box = np.array([(2.5, 3.5), (11.5, 3.5), (11.5, 9.5), (2.5, 9.5)])
    rois = {
        "Anterior": [on_slice(box, k, np.eye(4)) for k in range(4, 8)],
        "GTV=1": [on_slice(box, k, np.eye(4)) for k in range(8, 12)],
        "Body": [on_slice(box, k, np.eye(4)) for k in range(16)],
    }
    path = tmp_path / "rt.dcm"
    rtstruct(slices, rois).save_as(path, enforce_file_format=True)
    assert label_pair("GTV=1=posterior") == ("GTV=1", "posterior") and label_pair("-3=2") == (-3, 2)
    with pytest.warns(UserWarning, match="left out: 3 'Body'"):
        prepared = processor.preprocess(path, {"GTV=1": "posterior"})
    expected = np.zeros((20, 24, 16), np.int16)
    expected[3:12, 4:10, 4:8], expected[3:12, 4:10, 8:12] = 1, 2
    np.testing.assert_array_equal(prepared.target.array[0], expected)
    rtstruct(slices, {"Body": rois["Body"]}).save_as(path, enforce_file_format=True)
    with pytest.raises(VolumeError, match=r"none of which is called as a label \('background', 'anterior', 'post"):
        processor.preprocess(path)


def warned(processor, mask):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor.preprocess(mask)
    return [str(one.message) for one in caught]


def test_a_label_that_training_always_had_is_missed():
    """Only labels that are recorded as common; not in a mask of background, which has its own warning."""
    processor = VolumeProcessor(tiny_data(common_labels=[0, 2]), STRIDE)
    labels = labels_of((8, 8, 8))
    assert warned(processor, nib.Nifti1Image(labels, np.eye(4))) == []
    assert warned(processor, nib.Nifti1Image(np.where(labels == 5, 0, labels), np.eye(4))) == []
    without = nib.Nifti1Image(np.where(labels == 2, 5, labels), np.eye(4))
    (message,) = warned(processor, without)
    assert "has no anterior, which every training mask has" in message
    (message,) = warned(processor, nib.Nifti1Image(np.zeros_like(labels), np.eye(4)))
    assert "is background everywhere" in message
    assert warned(VolumeProcessor(tiny_data(), STRIDE), without) == []


def test_a_label_that_resampling_loses_is_told():
    """One voxel of 0.5 mm between the points of the grid at 1 mm, and a label that is large enough."""
    labels = np.zeros((16, 16, 16), np.int16)
    labels[2:12, 2:12, 2:12] = 2
    labels[14, 14, 13] = 5
    spaced = nib.Nifti1Image(labels, np.diag([0.5, 0.5, 0.5, 1.0]))
    lost = [message for message in warned(VolumeProcessor(tiny_data(), STRIDE), spaced) if "lost" in message]
    assert len(lost) == 1 and "posterior is too small for the model's spacing" in lost[0]
