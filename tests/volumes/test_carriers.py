"""Images of other libraries in memory: their geometry is read as nibabel's is, or they are refused by name."""

import types

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.data.utils import list_data_collate
from monai.transforms import Compose, EnsureChannelFirst, Flip, LoadImage, Orientation, Spacing
from tiny import editor_of, labels_of, seeded, tiny_pipeline

from evaluation.data.model_units import in_model_units
from pipelines import VolumeProcessor, describe_mask, write_synthetic
from volumes import VolumeError, read_mask, read_volume
from volumes.lesions import insert_lesion

SHAPE = (7, 8, 6)
LABELS = labels_of(SHAPE)
MR = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [5.0, 95.0]}


def affine_of(codes: str, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    """Of voxel axes that run as `codes` say, from an origin away from 0."""
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), SHAPE)
    affine = np.linalg.inv(affine) @ np.diag([*spacing, 1.0])
    affine[:3, 3] = 50, 60, 70
    return affine


def oblique() -> np.ndarray:
    """Turned by 30 degrees about the third axis, with voxels of three lengths."""
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    turned = np.eye(4)
    turned[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * [0.9, 1.0, 1.1]
    turned[:3, 3] = -20, 3, 8
    return turned


def lps(affine: np.ndarray) -> np.ndarray:
    return np.diag([-1.0, -1, 1, 1]) @ affine


def metatensor(voxels: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(voxels)[None].float(), affine=torch.from_numpy(affine))


def simple_itk(voxels: np.ndarray, affine: np.ndarray) -> sitk.Image:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps(affine)[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps(affine)[:3, 3].tolist())
    return image


class ScalarImage:
    """torchio's, as far as it is read: `data` (C, X, Y, Z) and `affine`; its module is named as torchio's."""

    __module__ = "torchio.data.image"

    def __init__(self, voxels: np.ndarray, affine: np.ndarray):
        self.data, self.affine, self.path = torch.from_numpy(voxels)[None], affine, None


CARRIERS = {
    "MetaTensor (1, X, Y, Z)": metatensor,
    "MetaTensor (X, Y, Z)": lambda v, a: MetaTensor(torch.from_numpy(v), affine=torch.from_numpy(a)),
    "MetaTensor of bfloat16": lambda v, a: MetaTensor(torch.from_numpy(v)[None].bfloat16(), affine=torch.from_numpy(a)),
    "MetaTensor in LPS": lambda v, a: MetaTensor(
        torch.from_numpy(v)[None], affine=torch.from_numpy(lps(a)), meta={"space": "LPS"}
    ),
    "SimpleITK": simple_itk,
    "torchio": ScalarImage,
    "MGH": lambda v, a: nib.MGHImage(v.astype(np.float32), a),
    "NIfTI-2": nib.Nifti2Image,
}


@pytest.mark.parametrize("affine", [affine_of("RAS"), affine_of("LAS"), affine_of("PIR", (1.5, 0.8, 1)), oblique()])
@pytest.mark.parametrize("kind", CARRIERS)
def test_a_carrier_is_read_as_the_same_nifti(kind, affine):
    """LABELS has no symmetry: a mirrored or permuted axis shows."""
    carrier, nifti = CARRIERS[kind](LABELS, affine), nib.Nifti1Image(LABELS, affine)
    for read in (read_mask, read_volume, lambda one: read_volume(one, exact=True)):
        volume, expected = read(carrier), read(nifti)
        np.testing.assert_array_equal(volume.array, expected.array)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)
        np.testing.assert_allclose(volume.source.affine, affine, atol=1e-5)
    assert read_mask(carrier).array.dtype == np.int16


@pytest.mark.parametrize("kind", CARRIERS)
def test_a_volume_lies_where_its_carrier_lay(kind):
    """An LAS mask, an image that is given, an image with a region: as from NIfTI, up to its type of voxels."""
    affine, pipe = affine_of("LAS"), tiny_pipeline(intensity=[MR])
    voxels = np.random.default_rng(0).uniform(0, 250, SHAPE).round().astype(np.int16)
    region = (np.indices(SHAPE)[0] < 3).astype(np.int16)

    def make(of) -> list:
        mask = of(LABELS, affine)
        plain = pipe([mask], num_inference_steps=2, generator=seeded(0)).volumes
        edit = {"image": {"MR": of(voxels, affine)}, "region": of(region, affine)}
        return plain + editor_of(pipe)(mask, num_inference_steps=2, generator=seeded(0), **edit).volumes

    for made, expected in zip(make(CARRIERS[kind]), make(nib.Nifti1Image), strict=True):
        np.testing.assert_allclose(made.affine, expected.affine, atol=1e-5)
        np.testing.assert_allclose(made.get_fdata(), expected.get_fdata(), atol=0.5)


def test_an_image_that_conditions_must_lie_on_the_masks_grid():
    pipe = tiny_pipeline(
        channels=["pet", "ct"],
        intensity=[MR, {"kind": "window", "low": -1000.0, "high": 1000.0}],
        images={"ct": 4, "pet": 4},
        condition_dropout={"ct": 0.5, "pet": 0.5, "mask": 0.1},
    )
    voxels, affine = np.random.default_rng(0).uniform(-900, 900, SHAPE).astype(np.float32), affine_of("LAS")
    settings = {"num_inference_steps": 1, "output_type": "pt"}
    expected, made = (
        pipe(of(LABELS, affine), image={"ct": of(voxels, affine)}, generator=seeded(0), **settings).volumes[0]
        for of in (nib.Nifti1Image, metatensor)
    )
    assert torch.equal(made, expected) and type(made) is torch.Tensor
    elsewhere = affine + np.array([[0, 0, 0, 9], [0] * 4, [0] * 4, [0] * 4])
    with pytest.raises(ValueError, match="lies on another grid than the mask"):
        pipe(metatensor(LABELS, affine), image={"ct": metatensor(voxels, elsewhere)}, **settings)


def test_a_batch_is_its_masks_each_on_its_own_grid():
    affines = [affine_of("LAS"), affine_of("RAS")]
    affines[1][:3, 3] = 1, 2, 3
    batch = list_data_collate([metatensor(LABELS, one) for one in affines])
    made = tiny_pipeline()(batch, num_inference_steps=1, generator=seeded(0, 1)).volumes
    for volume, affine in zip(made, affines, strict=True):
        np.testing.assert_allclose(volume.affine, affine)


def test_another_spacing_warns_and_is_resampled_as_a_files_is():
    processor, affine = VolumeProcessor(tiny_pipeline().data, (4, 4, 4)), affine_of("LAS", (2, 1, 1.5))
    with pytest.warns(UserWarning, match="the mask is resampled"):
        prepared = processor.preprocess(metatensor(LABELS, affine))
    with pytest.warns(UserWarning, match="the mask is resampled"):
        expected = processor.preprocess(nib.Nifti1Image(LABELS, affine))
    np.testing.assert_array_equal(prepared.labels, expected.labels)
    np.testing.assert_allclose(prepared.target.source.affine, affine)


def test_what_monais_transforms_did_is_in_the_affine(tmp_path):
    """Loaded, turned, flipped and resampled: the origin in mm of the voxel that was labeled stays where it was."""
    voxels = np.zeros(SHAPE, np.int16)
    voxels[2, 5, 1] = 5
    nib.save(nib.Nifti1Image(voxels, affine_of("LAS")), tmp_path / "mask.nii.gz")
    where = (affine_of("LAS") @ [2, 5, 1, 1])[:3]
    steps = [EnsureChannelFirst(), Orientation("PIR", labels=None), Flip(1), Spacing((0.5, 0.5, 0.5), mode="nearest")]
    loaded = Compose([LoadImage(), *steps])(str(tmp_path / "mask.nii.gz"))
    volume = read_mask(loaded)
    place = np.argwhere(volume.array[0] == 5).mean(axis=0)
    np.testing.assert_allclose((volume.affine @ [*place, 1])[:3], where, atol=0.5)
    assert describe_mask(loaded)["file"] == "mask.nii.gz"
    with pytest.raises(VolumeError, match=r"mask\.nii\.gz: has transforms that are still pending"):
        read_mask(Flip(0, lazy=True)(loaded))


def test_latents_in_a_metatensor_are_its_numbers():
    pipe, noise = tiny_pipeline(), torch.randn(1, 4, 2, 2, 2)
    mask = nib.Nifti1Image(LABELS, np.eye(4))
    made, expected = (
        pipe(mask, latents=one, num_inference_steps=1, output_type="latent").volumes[0]
        for one in (MetaTensor(noise, affine=torch.eye(4) * 2), noise)
    )
    assert type(made) is torch.Tensor and torch.equal(made, expected)


def test_components_and_time_points_are_channels():
    voxels = np.random.default_rng(0).normal(size=(*SHAPE, 3)).astype(np.float32)
    vector = sitk.GetImageFromArray(voxels.transpose(2, 1, 0, 3), isVector=True)
    series = sitk.JoinSeries([sitk.GetImageFromArray(voxels[..., i].transpose(2, 1, 0)) for i in range(3)])
    stacked = MetaTensor(torch.from_numpy(voxels).movedim(-1, 0), affine=torch.from_numpy(lps(np.eye(4))))
    expected = read_volume(nib.Nifti1Image(voxels, lps(np.eye(4)))).array
    for one in (vector, series, stacked):
        np.testing.assert_array_equal(read_volume(one).array, expected)
        with pytest.raises(VolumeError, match="holds 3; merge them into one|no whole number"):
            read_mask(one)


def test_a_nifti_without_codes_keeps_the_affine_of_nibabel(tmp_path):
    image = nib.Nifti1Image(LABELS, affine_of("LAS"))
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "plain.nii.gz")
    for one in (image, nib.load(tmp_path / "plain.nii.gz")):
        made = tiny_pipeline()(one, num_inference_steps=1).volumes[0]
        np.testing.assert_allclose(made.affine, one.affine)
        nib.save(made, tmp_path / "made.nii.gz")
        np.testing.assert_allclose(nib.load(tmp_path / "made.nii.gz").affine, one.affine)


def foreign(module: str, name: str):
    """An object whose class says that it is of that library."""
    return types.new_class(name, exec_body=lambda body: body.update(__module__=module))()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            foreign("itk.itkImagePython", "itkImageF3"),
            "itkImageF3: this kind of image is not read; write it .*itk.imwrite",
        ),
        (
            foreign("ants.core.ants_image", "ANTsImage"),
            "ANTsImage: this kind of image is not read; write it .*image_write",
        ),
        (foreign("xarray.core.dataarray", "DataArray"), "DataArray: this kind .*Nifti1Image\\(array.values, affine"),
        (foreign("torchio.data.subject", "Subject"), "Subject: this kind .*give one of its images"),
        (pydicom.Dataset(), "Dataset: this kind of image is not read; give the folder of its series"),
        (nib.AnalyzeImage(LABELS, np.eye(4)), "AnalyzeImage: this kind .*with the affine that you know"),
        (nib.Nifti1Image(LABELS, None), "the image has no affine"),
        (sitk.Image(7, 8, sitk.sitkUInt8), "has 2 dimensions; a volume has three"),
        (sitk.Cast(simple_itk(LABELS, np.eye(4)), sitk.sitkLabelUInt8), "give SimpleITK.LabelMapToLabel"),
        (MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.zeros(4, 4)), "its geometry is broken"),
        (MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(3)), "an affine is 4 x 4"),
        (MetaTensor(torch.zeros(1, 4, 4, 4), meta={"space": "ASL"}), "its affine leads to 'ASL'"),
        (MetaTensor(torch.zeros(1, 4, 4, 4, dtype=torch.complex64)), "give real numbers"),
        (np.ma.masked_equal(LABELS, 5), "is a masked array, whose mask would be lost"),
    ],
)
def test_what_cannot_be_read_right_is_refused_by_name(mask, message):
    pipe = tiny_pipeline(intensity=[MR])
    with pytest.raises(ValueError, match=message):
        pipe(mask, num_inference_steps=1)
    with pytest.raises(ValueError, match=message):
        editor_of(pipe)(LABELS, image=mask, region=np.ones(SHAPE), num_inference_steps=1)


def test_functions_that_take_one_kind_alone_name_it(tmp_path):
    mask = metatensor(LABELS, np.eye(4))
    with pytest.raises(ValueError, match=r"got MetaTensor; give volumes.read_mask\(mask\)"):
        insert_lesion(mask, np.ones((1, 1, 1)), (3, 3, 3), 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got MetaTensor; write what the pipeline returns as output_type='nifti'"):
        write_synthetic(mask, {}, tmp_path / "a.nii.gz")  # pyright: ignore[reportArgumentType]
    with pytest.raises(VolumeError, match="carries its geometry .* got ndarray"):
        in_model_units(LABELS, tiny_pipeline().data)
    with pytest.raises(VolumeError, match="units and axes are for files; change the geometry of the MetaTensor"):
        read_mask(mask, units="m")
    assert not [*tmp_path.iterdir()]
    nifti = in_model_units(nib.Nifti1Image(LABELS, affine_of("LAS")), tiny_pipeline().data)
    np.testing.assert_array_equal(in_model_units(metatensor(LABELS, affine_of("LAS")), tiny_pipeline().data), nifti)
