"""`data.resample_to`: functions of the place in the patient, sampled on several grids, agree on that of the reference;
what a volume does not show is outside the field of view."""

import dataclasses
import logging

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from autoencoder import SpaceToDepth3D
from autoencoder.residual_noise import measure_noise
from diffusion import LatentCacheConfig
from diffusion.latents.cache import deformed
from evaluation.data.pairs import Pair, load_pairs
from evaluation.doctor.cases import examine
from evaluation.doctor.data_checks import check_geometry
from volumes import (
    PADDING,
    CropDataset,
    DataConfig,
    IntensityScaling,
    PhantomConfig,
    Volume,
    VolumeDataset,
    VolumeError,
    describe,
    load_cases,
    pad_or_crop,
    pad_sample,
)
from volumes.data.alignment import MASK, align, onto_grid, shown
from volumes.data.preprocessing import described_preprocessing, differences, preprocessing
from volumes.data.subjects import voxel_digests
from volumes.description import DataDescription

CENTER, RADIUS = np.array([14.0, 12.0, 13.0]), 7.0  # of the ball, mm


def grid(shape, spacing, origin, angle=0.0):
    """Shape and affine, turned about the third axis by `angle`."""
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) * spacing
    affine[:3, 3] = origin
    return shape, affine


CT = grid((28, 24, 26), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
SHIFTED = grid((22, 20, 30), (1.25, 1.5, 0.8), (-0.6, -3.0, 1.7))
OBLIQUE = grid((26, 26, 22), (1.1, 1.0, 1.3), (4.0, -5.0, -1.0), 0.25)


def places(shape, affine):
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def ramp(shape, affine):
    """A linear function of the place, which linear interpolation reproduces."""
    return Volume((places(shape, affine) @ [3.0, -2.0, 4.0] + 50).astype(np.float32)[None], affine)


def ball(shape, affine):
    """1 in a ball, 0 outside it."""
    inside = np.linalg.norm(places(shape, affine) - CENTER, axis=-1) < RADIUS
    return Volume(inside[None].astype(np.int16), affine)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def inner(seen, voxels=2):
    """Where the voxels around one are seen, too: at the edge, values are repeated."""
    padded = np.pad(seen, voxels)
    views = [np.roll(padded, step, axis) for axis in range(3) for step in range(-voxels, voxels + 1)]
    core = np.logical_and.reduce(views)
    return core[voxels:-voxels, voxels:-voxels, voxels:-voxels]


@pytest.mark.parametrize("other", [SHIFTED, OBLIQUE, grid((14, 12, 13), (2.0, 2.0, 2.0), (1.0, 0.5, 0.3))])
@pytest.mark.parametrize("spacing", [None, (1.3, 0.9, 1.0)])
def test_a_ramp_and_a_ball_are_where_they_were(other, spacing):
    """From grids of other spacing, shifted, and oblique."""
    mask = ball(*other)
    aligned = align({"ct": ramp(*CT), "mr": ramp(*other)}, mask, "ct", spacing)
    where = places(aligned.image.shape, aligned.image.affine)
    seen = np.ones(aligned.image.shape, bool) if aligned.seen is None else aligned.seen
    assert aligned.image.array.shape[0] == 2 and seen.any(axis=(1, 2)).all() and aligned.image.array.dtype == np.float32
    np.testing.assert_allclose(aligned.image.spacing, spacing or (1, 1, 1))
    core = inner(seen)
    assert core.mean() > 0.3
    for channel in aligned.image.array:
        np.testing.assert_allclose(channel[core], (where @ [3.0, -2.0, 4.0] + 50)[core], atol=0.05)
        assert np.isnan(channel[~seen]).all()
    labels, distance = aligned.mask.array[0], np.linalg.norm(where - CENTER, axis=-1) - RADIUS
    assert set(np.unique(labels[seen])) == {0, 1} and (labels[~seen] == PADDING).all()
    assert dice(labels == 1, (distance < 0) & seen) > 0.88
    sure = seen & (np.abs(distance) > np.linalg.norm(mask.spacing) / 2)
    assert ((labels == 1) == (distance < 0))[sure].all()  # the nearest voxel is at most half a diagonal away


def test_the_voxels_of_the_reference_stay():
    first = ramp(*CT)
    aligned = align({"pet": ramp(*SHIFTED), "ct": first}, None, "ct")
    start = np.rint(aligned.image.affine[:3, 3]).astype(int)  # of the box, in voxels of 1 mm
    x, y, z = (slice(a, a + n) for a, n in zip(start, aligned.image.shape, strict=True))
    np.testing.assert_array_equal(aligned.image.array[1], first.array[0, x, y, z])
    edge = places(*CT) @ np.linalg.inv(SHIFTED[1])[:3, :3].T + np.linalg.inv(SHIFTED[1])[:3, 3]
    inside = ((edge >= -0.5) & (edge <= np.array(SHIFTED[0]) - 0.5)).all(-1)
    assert aligned.seen is None and aligned.image.array[0].size == inside.sum()
    assert aligned.share == pytest.approx(inside.mean())
    (one,) = aligned.resampled
    assert one.name == "pet" and one.ratio == pytest.approx(1.5) and one.share == aligned.share
    centers = [(np.array(shape) - 1) / 2 @ affine[:3, :3].T + affine[:3, 3] for shape, affine in (CT, SHIFTED)]
    assert one.shift == pytest.approx(np.linalg.norm(centers[0] - centers[1]))


def test_the_field_of_view_is_what_image_and_mask_share():
    """An oblique MR cuts the mask that lies on CT's grid, and an oblique mask cuts both images."""
    cut = align({"ct": ramp(*CT), "mr": ramp(*OBLIQUE)}, ball(*CT), "ct")
    assert cut.seen is not None and not cut.seen.all() and [one.name for one in cut.resampled] == ["mr"]
    np.testing.assert_array_equal(cut.mask.array[0] == PADDING, ~cut.seen)
    other = align({"ct": ramp(*CT), "mr": ramp(*CT)}, ball(*OBLIQUE), "ct")
    np.testing.assert_array_equal(other.seen, cut.seen)
    assert (np.isnan(other.image.array) == ~other.seen).all() and [one.name for one in other.resampled] == [MASK]


def test_volumes_on_one_grid_stay_as_they_are():
    first, mask = ramp(*CT), ball(*CT)
    aligned = align({"ct": first, "pet": ramp(*CT)}, mask, "ct")
    assert aligned.resampled == () and aligned.seen is None and aligned.mask is mask and aligned.share == 1
    np.testing.assert_array_equal(aligned.image.array[0], first.array[0])


@pytest.mark.parametrize("other", [SHIFTED, OBLIQUE])
def test_simple_itk_resamples_alike(other):
    """Onto a finer grid, where nothing is smoothed first: random voxels and labels."""
    random = np.random.default_rng(0)
    target = Volume(np.zeros((1, 40, 36, 44), np.float32), grid((40, 36, 44), (0.7, 0.7, 0.7), (0.31, -0.23, 0.17))[1])
    for labels in (False, True):
        values = random.integers(0, 5, other[0]) if labels else random.normal(size=other[0])
        volume = Volume(values[None].astype(np.int16 if labels else np.float32), other[1])
        ours = onto_grid(volume, target, labels=labels)
        image = sitk.GetImageFromArray(volume.array[0].T)
        for what, affine in ((image, other[1]), (reference := sitk.Image(40, 36, 44, sitk.sitkFloat32), target.affine)):
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            what.SetSpacing(spacing.tolist())
            what.SetOrigin(affine[:3, 3].tolist())
            what.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        how = sitk.sitkNearestNeighbor if labels else sitk.sitkLinear
        theirs = sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform(), how, -100.0)).T
        seen = shown(ours)
        np.testing.assert_array_equal(seen, theirs != -100)
        if labels:
            assert (ours.array[0] == theirs)[seen].mean() > 0.999  # ties are rounded either way
        else:
            np.testing.assert_allclose(ours.array[0][seen], theirs[seen], atol=1e-3)


def test_volumes_of_other_places_are_refused_by_name():
    names = {"ct": "a_ct.nii", "mr": "a_mr.nii", MASK: "a_mask.nii"}
    far = grid((20, 20, 20), (1.0, 1.0, 1.0), (500.0, 0.0, 0.0))
    with pytest.raises(VolumeError, match="a_mr.nii: shows nothing of the box of a_ct.nii.*same patient"):
        align({"ct": ramp(*CT), "mr": ramp(*far)}, None, "ct", files=names)
    corner = grid((2, 24, 13), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    with pytest.raises(VolumeError, match=r"a_mask.nii: shows only 3.6% of the box of a_ct.nii, and 5% are needed"):
        align({"ct": ramp(*CT)}, ball(*corner), "ct", files=names)
    halves = [grid((16, 24, 26), (1.0, 1.0, 1.0), (x, 0.0, 0.0)) for x in (0.0, 15.0)]
    with pytest.raises(VolumeError, match=r"with the other volumes of its case: shows only 3\.6%"):
        align({"ct": ramp(*CT), "mr": ramp(*halves[0]), "pet": ramp(*halves[1])}, None, "ct", files=names)


# Data sets


def save(volume, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.array[0], volume.affine), path)


@pytest.fixture
def folder(tmp_path):
    """Two patients: MR and mask on a grid of their own; of the second oblique."""
    for name, other in (("a", SHIFTED), ("b", OBLIQUE)):
        save(ramp(*CT), tmp_path / f"{name}_ct.nii")
        save(ramp(*other), tmp_path / f"{name}_mr.nii")
        save(ball(*other), tmp_path / f"{name}_mask.nii")
    return tmp_path


def config_of(folder, **changes):
    arguments = {
        "root": str(folder),
        "images": {"mr": "{name}_mr.nii", "ct": "{name}_ct.nii"},
        "masks": "{name}_mask.nii",
        "label_names": {0: "background", 1: "ball"},
        "intensity": IntensityScaling("window", -100, 300),
        "validation_fraction": 0,
        "resample_to": "ct",
    }
    return DataConfig(**(arguments | changes))


def dataset_of(folder, **changes):
    config = config_of(folder, **changes)
    return VolumeDataset(load_cases(config), config)


def test_a_data_set_is_read_onto_one_grid_and_says_so(folder, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = dataset_of(folder)
    assert "data.resample_to: 2 of 2 cases were resampled onto ct's grid (mr of 2, the mask of 2)" in caplog.text
    assert "voxel sizes up to 1.5 times different" in caplog.text and "the rest is left out" in caplog.text
    for item, oblique in zip((dataset[0], dataset[1]), (False, True), strict=True):
        where = places(tuple(item["image"].shape[1:]), item["affine"].numpy())
        expected = torch.from_numpy((where @ [3.0, -2.0, 4.0] + 50 + 100) / 200 - 1).float()
        assert ("seen" in item) == oblique
        seen = item["seen"][0] if oblique else torch.ones(item["mask"].shape, dtype=torch.bool)
        core = torch.from_numpy(inner(seen.numpy()))
        for channel in item["image"]:
            torch.testing.assert_close(channel[core], expected[core], atol=1e-3, rtol=0)
            assert (channel[~seen] == -1).all()
        assert (item["mask"][~seen] == PADDING).all() and set(item["mask"][seen].tolist()) == {0, 1}


def test_the_field_of_view_reaches_padded_volumes_and_crops(folder):
    dataset = dataset_of(folder)
    item, padded = dataset[1], pad_sample(dataset[1], 8)
    inside = padded["placement"].undo(padded["fov"])
    assert torch.equal(inside, item["seen"]) and padded["fov"].sum() == item["seen"].sum() < item["seen"].numel()
    crops = CropDataset(dataset, (16, 40, 16), seed=0, flip_axes=(0, 1, 2), samples_per_volume=4)
    for crop in (crops[index] for index in range(len(crops))):
        outside = ~crop["fov"][0]
        assert outside.any() and (crop["mask"][outside] == PADDING).all() and (crop["mask"][~outside] >= 0).all()
        assert (crop["image"][:, outside] == -1).all() and (crop["image"][:, ~outside] > -1).all()


def test_percentiles_are_of_the_field_of_view(folder):
    """Not of what fills the rest."""
    dataset = dataset_of(folder, intensity=IntensityScaling("percentile", 0, 100))
    seen = dataset.load(1).seen
    for channel, scale in zip(dataset[1]["image"].numpy(), dataset.facts[1].scales, strict=True):
        assert channel[seen].min() == -1 and channel[seen].max() == pytest.approx(1)
        assert scale.low > -50


def test_a_mask_of_another_series_is_resampled_to_the_image(folder):
    changes = {"images": "{name}_ct.nii", "resample_to": "image"}
    dataset = dataset_of(folder, **changes)
    where = places(tuple(dataset[0]["image"].shape[1:]), dataset[0]["affine"].numpy())
    truth = np.linalg.norm(where - CENTER, axis=-1) < RADIUS
    assert dice(dataset[0]["mask"].numpy() == 1, truth) > 0.9
    values = dataset.label_map(1)
    assert set(np.unique(values.array)) == {PADDING, 0, 1}
    other = dataset_of(folder, label_names={3: "background", 7: "ball"}, label_map={0: 3, 1: 7}, **changes)
    np.testing.assert_array_equal(other.label_map(1).array == 7, values.array == 1)
    assert set(np.unique(other.label_map(1).array)) == {PADDING, 3, 7}


def test_without_the_setting_the_refusal_names_it(folder):
    with pytest.raises(VolumeError, match=r"a_ct.nii: is not on the grid of .*a_mr.nii.*set data.resample_to: mr "):
        dataset_of(folder, resample_to=None)
    with pytest.raises(VolumeError, match=r"a_mask.nii: is not on the grid.*set data.resample_to: image"):
        dataset_of(folder, resample_to=None, images="{name}_ct.nii")


def test_what_cannot_be_the_reference_is_refused(folder):
    with pytest.raises(ValueError, match="resample_to is 'pet', the image channels are mr, ct"):
        config_of(folder, resample_to="pet")
    with pytest.raises(ValueError, match="phantom takes the place of files; remove resample_to"):
        DataConfig(phantom=PhantomConfig(), resample_to="image")


def test_digests_are_of_the_voxels_in_the_files(folder):
    """So a subject is known again, however its volumes are brought onto one grid."""
    dataset = dataset_of(folder)
    stored = [voxel_digests(ramp(*of).array)[0] for of in (SHIFTED, CT)]
    assert dataset.facts[0].voxels == tuple(stored)
    assert dataset_of(folder, resample_to="mr").marks[0] == dataset.marks[0]


def test_the_numbers_of_a_grid_are_those_of_the_box(folder):
    dataset = dataset_of(folder, numbers=["size_x", "spacing_y"])
    sizes = [item["image"].shape[1] * 1.0 for item in (dataset[0], dataset[1])]
    assert [one.numbers for one in dataset.facts] == [pytest.approx((size, 1.0)) for size in sizes]


def test_a_misplaced_case_is_skipped_by_name(folder):
    save(ramp(*grid((20, 20, 20), (1.0, 1.0, 1.0), (500.0, 0.0, 0.0))), folder / "a_mr.nii")
    with pytest.raises(VolumeError, match="a_mr.nii: shows nothing of the box of .*a_ct.nii"):
        dataset_of(folder)
    assert [name for name, _ in dataset_of(folder, on_error="skip").skipped] == ["a"]


def test_the_setting_is_recorded_and_compared(folder):
    dataset = dataset_of(folder)
    described = describe(dataset)
    assert described.resample_to == "ct" and DataDescription.from_json(described.to_json()) == described
    facts, other = dataset.preprocessing, preprocessing(config_of(folder, resample_to="mr"))
    assert facts["resample_to"] == "ct" and differences(described_preprocessing(described), facts) == []
    assert differences(facts, other) == [
        "resample_to: it learned channels resampled onto ct's grid, the data has channels resampled onto mr's grid"
    ]
    assert (
        "the data has channels on one grid" in differences(facts, preprocessing(config_of(folder, resample_to=None)))[0]
    )
    plain = dataclasses.replace(described, resample_to=None)
    assert "resample_to" not in plain.to_json() and DataDescription.from_json(plain.to_json()) == plain
    with pytest.raises(ValueError, match="resample_to is '3'; expected the name of a channel"):
        DataDescription.from_json(described.to_json() | {"resample_to": 3})


def test_deforming_keeps_to_the_field_of_view():
    """Whatever stands outside, the same voxels are seen, and the mask has PADDING elsewhere."""
    seen = torch.zeros(14, 14, 14, dtype=torch.bool)
    seen[3:, :11] = True
    image, mask = torch.rand(2, 14, 14, 14) * 2 - 1, torch.ones(14, 14, 14, dtype=torch.int16)
    results = []
    for fill in (-1.0, 1.0):
        filled = torch.where(seen, image, fill)
        generator = torch.Generator().manual_seed(3)
        results.append(deformed(filled, mask, LatentCacheConfig(rotate=20, deform=1.0), generator, seen=seen))
    (first, labels, fov), (second, _, _) = results
    torch.testing.assert_close(first, second)
    assert 0.3 < fov.float().mean() < 0.75 and (first[:, ~fov] == -1).all()
    assert torch.equal(labels == PADDING, ~fov)


def test_the_doctor_tells_what_is_lost_and_what_to_set(folder):
    save(ramp((10, 20, 30), SHIFTED[1]), folder / "b_mr.nii")
    examined = [examine(case, config_of(folder)) for case in load_cases(config_of(folder))]
    (finding,) = [one for one in check_geometry(examined, config_of(folder)) if one.check == "grids"]
    assert finding.level == "WARN" and "2 of 2 cases were resampled onto ct's grid" in finding.message
    assert [file[-8:] for file in finding.files] == ["b_mr.nii"]  # the first channel names the case
    assert "set data.resample_to: mr, whose grid the others may show whole" in finding.remedy
    assert [one.shape for one in examined] == [CT[0]] * 2 and examined[0].model_shape != CT[0]
    assert all(one.highest[1] == ramp(*CT).array.max() for one in examined)
    assert all(0 < one.labels["ball"] < 4 / 3 * np.pi * RADIUS**3 / 1000 * 1.05 for one in examined)
    whole = config_of(folder, images="{name}_ct.nii", masks=None, label_names={}, resample_to="image")
    assert not [
        one for one in check_geometry([examine(c, whole) for c in load_cases(whole)], whole) if one.check == "grids"
    ]


def test_a_segmenters_real_pairs_are_on_one_grid(folder):
    config = config_of(folder)
    cases = load_cases(config)
    loaded = load_pairs([Pair(case) for case in cases], config, (24, 24, 24))
    for index in range(2):
        mask = VolumeDataset(cases, config).load(index).mask
        expected = pad_or_crop(mask.shape, (24, 24, 24)).apply(np.maximum(mask.array[0], 0), 0)
        np.testing.assert_array_equal(loaded.labels[index].numpy(), expected)
    assert loaded.images.shape == (2, 2, 24, 24, 24) and bool(loaded.images.isfinite().all())


def test_noise_is_measured_in_the_field_of_view(folder):
    """A coder that is wrong there alone has nothing missing."""

    class Wrong(SpaceToDepth3D):
        def decode(self, *arguments, **keywords):
            (made,) = super().decode(*arguments, **keywords)
            return (torch.where(made == -1, torch.rand(made.shape), made),)

    dataset = dataset_of(folder, images="{name}_ct.nii", resample_to="image")
    (noise,) = measure_noise(dataset, Wrong(patch_size=(2, 2, 2)), progress=False)
    assert noise.std < 1e-5
