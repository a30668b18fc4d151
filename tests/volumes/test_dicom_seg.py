"""DICOM-SEG: written by highdicom from a known array, read voxel for voxel; files that lie are refused by name."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from structures import LPS, oblique, series_of

from volumes import Volume, VolumeError, read_mask, read_volume, write_volume

hd = pytest.importorskip("highdicom", reason="the extra dicomseg is not installed")

SHAPE = (5, 6, 9)  # 30 pixels a frame: frames begin within bytes
AFFINES = {
    "axial": np.diag([1.0, 2.0, 3.0, 1.0]),
    "oblique": oblique(),
    "sagittal": np.array([[0, 0, 3.0, -7], [1.0, 0, 0, 5], [0, -2.0, 0, 9], [0, 0, 0, 1]]),
}
NAMES = ("tumor", "edema")


def labels() -> np.ndarray:
    """Two segments in four of nine slices, the outer slices and two inner ones being empty."""
    mask = np.zeros(SHAPE, np.int16)
    mask[1:4, 2:5, 2:4], mask[0, 0, 3] = 1, 1
    mask[3:, 1:4, 6:8], mask[4, 5, 3] = 2, 2
    return mask


def stored(mask: np.ndarray) -> np.ndarray:
    """Frames (slice, row, column), as `series_of` writes the slices of a volume in RAS+ order."""
    return np.ascontiguousarray(mask[::-1, ::-1].transpose(2, 1, 0)).astype(np.uint8)


def written(path: Path, frames: np.ndarray, slices: Sequence[Dataset], kind="BINARY", names=NAMES, **options) -> Path:
    """A SEG of frames (slice, row, column) of numbers, or (..., segment) of bools."""
    software = hd.AlgorithmIdentificationSequence("a test", codes.DCM.ArtificialIntelligence, "1")
    segments = [
        hd.seg.SegmentDescription(
            number, name, codes.SCT.Tissue, codes.SCT.Tissue, "AUTOMATIC", algorithm_identification=software
        )
        for number, name in enumerate(names, start=1)
    ]
    one = hd.seg.Segmentation(
        slices, frames, kind, segments, hd.UID(), 1, hd.UID(), 1, "maker", "model", "1", "1", **options
    )
    path.parent.mkdir(exist_ok=True)
    one.save_as(path)
    return path


class Drawn:
    """A series and a SEG beside it."""

    def __init__(self, folder: Path, affine: np.ndarray):
        self.folder = folder
        self.image = read_canonical(affine)
        self.slices = series_of(self.image, folder / "ct")
        self.path = folder / "seg" / "1.dcm"

    def write(self, frames=None, **options) -> Path:
        mask = stored(labels()) if frames is None else frames
        return written(self.path, mask, self.slices, **options)


def read_canonical(affine: np.ndarray) -> Volume:
    """An image in RAS+ order whose first voxel and directions come from an affine of any order."""
    found = read_volume(nib.Nifti1Image(np.arange(270, dtype=np.int16).reshape(SHAPE), affine))
    array = np.arange(270, dtype=np.int16).reshape(1, *found.shape)
    return Volume(array, found.affine)


@pytest.fixture(params=AFFINES)
def drawn(request, tmp_path) -> Drawn:
    return Drawn(tmp_path, AFFINES[request.param])


@pytest.fixture
def plain(tmp_path) -> Drawn:
    return Drawn(tmp_path, AFFINES["axial"])


def mask_on(volume: Volume) -> np.ndarray:
    """`labels`, in the shape of an image."""
    return labels().reshape(volume.shape) if volume.shape != SHAPE else labels()


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("sparse", [True, False])
def test_what_highdicom_writes_is_read_voxel_for_voxel(drawn, kind, sparse):
    """Empty frames left out or not: on the grid of its series; by another order of frames as well."""
    mask = mask_on(drawn.image)
    path = drawn.write(stored(mask), kind=kind, omit_empty_frames=sparse)
    found = read_mask(path)
    assert found.array.dtype == np.int16
    np.testing.assert_array_equal(found.array[0], mask)
    np.testing.assert_allclose(found.affine, drawn.image.affine, atol=1e-6)
    np.testing.assert_array_equal(read_mask(path.parent).array[0], mask)
    image = drawn.folder / "image.nii.gz"
    write_volume(drawn.image, image)
    alone = drawn.folder / "elsewhere" / "deep" / "seg"
    alone.parent.mkdir(parents=True)
    path.rename(alone)  # without a suffix, and away from its series
    np.testing.assert_array_equal(read_mask(alone, like=read_volume(image)).array[0], mask)
    if sparse and not mask.any(axis=(0, 1)).all():
        with pytest.raises(VolumeError, match=r"frames of \d of the \d slices of .*empty ones were left out"):
            read_mask(alone)
    else:
        np.testing.assert_array_equal(read_mask(alone).array[0], mask)
        np.testing.assert_allclose(read_mask(alone).affine, drawn.image.affine, atol=1e-6)


def test_highdicom_and_itk_read_the_same(drawn):
    mask = mask_on(drawn.image)
    theirs = hd.seg.segread(drawn.write(stored(mask))).get_volume(combine_segments=True)
    frames = np.zeros_like(mask)
    to_voxels = np.linalg.inv(drawn.image.affine) @ LPS @ theirs.affine
    for place in np.argwhere(theirs.array):
        x, y, z = np.rint(to_voxels[:3] @ [*place, 1]).astype(int)
        frames[x, y, z] = theirs.array[tuple(place)]
    np.testing.assert_array_equal(read_mask(drawn.path).array[0], frames)
    # GDCM knows one segment, and no frame that begins within a byte: 32 pixels a frame
    even = Volume(np.zeros((1, 4, 8, 5), np.int16), drawn.image.affine)
    tumor = (np.random.default_rng(0).random(even.shape) < 0.4).astype(np.int16)
    slices = series_of(even, drawn.folder / "even")
    path = written(drawn.folder / "even_seg" / "a.dcm", stored(tumor), slices, names=["x"], omit_empty_frames=False)
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    to_voxels = np.linalg.inv(even.affine) @ LPS @ affine
    theirs, found = sitk.GetArrayFromImage(image).T, np.zeros(even.shape, np.int16)
    for place in np.argwhere(theirs):
        x, y, z = np.rint(to_voxels[:3] @ [*place, 1]).astype(int)
        found[x, y, z] = 1
    np.testing.assert_array_equal(found, tumor)
    np.testing.assert_array_equal(read_mask(path).array[0], tumor)


def test_frames_lie_where_they_say(plain):
    """Frames in another order, as a writer may leave them."""
    path = plain.write()
    one = pydicom.dcmread(path)
    frames = [*one.PerFrameFunctionalGroupsSequence]
    bits = np.unpackbits(np.frombuffer(one.PixelData, np.uint8), bitorder="little")[: 30 * len(frames)]
    order = np.random.default_rng(1).permutation(len(frames))
    one.PerFrameFunctionalGroupsSequence = [frames[i] for i in order]
    packed = np.packbits(bits.reshape(-1, 30)[order].ravel(), bitorder="little").tobytes()
    one.PixelData = packed + b"\0" * (len(packed) % 2)
    one.save_as(path)
    np.testing.assert_array_equal(read_mask(path).array[0], labels())


def test_names_decide_which_and_what(plain):
    path = plain.write()
    with pytest.warns(UserWarning, match="left out: 1 'tumor'"):
        np.testing.assert_array_equal(read_mask(path, names={"Edema": 7}).array[0], 7 * (labels() == 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_mask(path, names={1: 3, "edema": 3}).array[0], 3 * (labels() > 0))
    with pytest.raises(VolumeError, match=r"holds 1 'tumor', 2 'edema', none .* is called as a label \('gland'\)"):
        read_mask(path, names={"gland": 1})


def test_segments_that_overlap_and_fractions_are_refused(plain):
    frames = np.zeros((*stored(labels()).shape, 2), np.uint8)
    frames[2, 1:4, 1:3, 0] = 1
    frames[2, 3:5, 1:4, 1] = 1
    path = plain.write(frames)
    with pytest.raises(VolumeError, match="segment 'tumor' and segment 'edema' overlap in 2 voxels"):
        read_mask(path)
    assert (read_mask(path, names={"tumor": 1, "edema": 1}).array != 0).sum() == 6 + 6 - 2
    fractional = plain.write(frames.astype(np.float32) / 2, kind="FRACTIONAL")
    with pytest.raises(VolumeError, match="its segments are fractional .* threshold it"):
        read_mask(fractional)


def spoiled(fault: str, path: Path) -> None:
    one = pydicom.dcmread(path)
    frame, shared = one.PerFrameFunctionalGroupsSequence[0], one.SharedFunctionalGroupsSequence[0]
    if fault == "rows":
        one.Rows = 60000
    elif fault == "frames":
        one.NumberOfFrames = 65535
    elif fault == "no pixels":
        del one.PixelData
    elif fault == "few pixels":
        one.PixelData = one.PixelData[:4]
    elif fault == "bits":
        one.BitsAllocated = 16
    elif fault == "no segments":
        one.SegmentSequence = []
    elif fault == "segment":
        frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9
    elif fault == "twice":
        one.SegmentSequence[1].SegmentNumber = 1
    elif fault == "no groups":
        del one.PerFrameFunctionalGroupsSequence
    elif fault == "no place":
        del frame.PlanePositionSequence
    elif fault == "nan":
        frame.PlanePositionSequence[0].ImagePositionPatient = ["nan", "0", "0"]
    elif fault == "between":
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [*place.ImagePositionPatient[:2], place.ImagePositionPatient[2] + 1]
    elif fault == "outside":
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [*place.ImagePositionPatient[:2], -300]
    elif fault == "spacing":
        shared.PixelMeasuresSequence[0].PixelSpacing = [0, 1]
    elif fault == "axes":
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 1, 0, 0]
    elif fault == "frame":
        one.FrameOfReferenceUID = "1.2.3"
    elif fault == "type":
        one.SegmentationType = "SURFACE"
    elif fault == "deflated":
        one.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    one.save_as(path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("rows", "frames of 5 x 60000 pixels, more than it can hold"),
        ("frames", "describes 5 frames, and says that it has 65535"),
        ("no pixels", "has no pixels"),
        ("few pixels", "holds 4 bytes of pixels, fewer than its frames"),
        ("bits", "has 16 bits a pixel; BINARY segments have 1"),
        ("no segments", "holds no segments"),
        ("segment", r"has voxels of segment 9, which it does not describe; it has 1 'tumor', 2 'edema'"),
        ("twice", "two of its segments have the number 1"),
        ("no groups", "describes 0 frames"),
        ("no place", "frame 1 has no PlanePositionSequence"),
        ("nan", "frame 1: ImagePositionPatient is"),
        ("between", "does not lie on its series .*frame 1 of 5 x 6 pixels lies on no plane"),
        ("outside", "does not lie on its series .*frame 1 of 5 x 6 pixels lies on no plane"),
        ("spacing", "frame 1 has a broken geometry"),
        ("axes", "frame 1 has a broken geometry"),
        ("frame", "its frame of reference is 1.2.3"),
        ("type", "its SegmentationType is 'SURFACE'"),
        ("deflated", "is stored as Deflated"),
        ("truncated", "more than it can hold|cannot be read as DICOM-SEG|fewer than its frames"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_files_that_are_refused(plain, fault, reason):
    path = plain.write()
    spoiled(fault, path)
    with pytest.raises(VolumeError, match=reason) as refused:
        read_mask(path)
    assert str(path) in str(refused.value)


def test_a_seg_is_no_image(plain):
    path = plain.write()
    for place in (path, path.parent):
        with pytest.raises(VolumeError, match="1.dcm: is a DICOM SEG object, not an image; read it as a mask"):
            read_volume(place)
    path.rename(plain.folder / "ct" / "seg.dcm")
    np.testing.assert_array_equal(read_volume(plain.folder / "ct").array, plain.image.array)
    np.testing.assert_array_equal(read_mask(plain.folder / "ct").array[0], labels())


def thick(folder: Path, planes: list[int]) -> tuple[Volume, Path]:
    """A SEG of some planes beside its series of 3 mm. Returns: its label map and file."""
    affine, mask = np.diag([1.0, 1.0, 3.0, 1.0]), np.zeros((6, 6, 6), np.int16)
    mask[2:5, 1:4, planes] = 1
    slices = series_of(Volume(np.zeros((1, 6, 6, 6), np.int16), affine), folder / "ct")
    return Volume(mask[None], affine), written(folder / "seg" / "1.dcm", stored(mask), slices, names=["tumor"])


@pytest.mark.parametrize("planes", [[1, 2, 3, 4], [1, 4], [2]])
def test_frames_of_3_mm_are_no_stripes_at_1_mm(tmp_path, planes):
    """They lie on planes of an image of 1 mm, but were drawn on their own series; away from it they are refused."""
    mask, path = thick(tmp_path, planes)
    fine = Volume(np.zeros((1, 6, 6, 18), np.float32), np.eye(4))
    found = read_mask(path, like=fine)
    np.testing.assert_array_equal(found.array, mask.array)
    np.testing.assert_allclose(found.affine, mask.affine, atol=1e-6)
    alone = tmp_path / "elsewhere" / "deep" / "1.dcm"
    alone.parent.mkdir(parents=True)
    path.rename(alone)
    np.testing.assert_array_equal(read_mask(alone, like=mask).array, mask.array)  # as many slices as its series
    if len(planes) > 1:
        step = 3 * min(np.diff(planes))
        with pytest.raises(VolumeError, match=f"put the folder of that series .*frames are at least {step} planes"):
            read_mask(alone, like=fine)


def test_left_out_segments_are_named_with_each_file(plain):
    path = plain.write()
    (copy := path.parent.parent / "seg2.dcm").write_bytes(path.read_bytes())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for one in (path, copy):
            read_mask(one, names={"edema": 2})
    assert [str(one.message).split(": ")[0] for one in caught] == [str(path), str(copy)]
