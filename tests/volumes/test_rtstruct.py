"""RTSTRUCT: contours whose inside is known, on grids in any direction; files that lie are refused by name."""

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from matplotlib.path import Path as Polygon
from pydicom.uid import SurfaceSegmentationStorage
from structures import oblique, on_slice, rtstruct, series_of

from volumes import DataConfig, Volume, VolumeDataset, VolumeError, load_cases, read_mask, read_volume, write_volume
from volumes.formats.rtstruct import fill

SHAPE = (24, 20, 16)
CENTER, RADIUS = (11.37, 9.61, 7.83), 6.283  # voxels; no voxel's center is within 1e-3 of the border
AFFINES = {"axial": np.diag([1.0, 1.5, 2.0, 1.0]), "oblique": oblique()}


def circle(k: int, points: int = 900) -> np.ndarray | None:
    """The outline of a ball on slice k, (n, 2) in voxels."""
    left = RADIUS**2 - (k - CENTER[2]) ** 2
    if left <= 0:
        return None
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.c_[np.cos(turn), np.sin(turn)] * np.sqrt(left) + CENTER[:2]


def ball() -> np.ndarray:
    """The voxels whose centers are in it."""
    x, y, z = np.indices(SHAPE)
    return (x - CENTER[0]) ** 2 + (y - CENTER[1]) ** 2 + (z - CENTER[2]) ** 2 < RADIUS**2


def box(low: float, high: float) -> np.ndarray:
    return np.array([(low, low), (high, low), (high, high), (low, high)])


def square(low: int, high: int) -> np.ndarray:
    """The voxels of SHAPE between two limits of x and y."""
    x, y, _ = np.indices(SHAPE)
    return (x > low) & (x < high) & (y > low) & (y < high)


class Drawn:
    """A series, and what is drawn on it."""

    def __init__(self, folder: Path, affine: np.ndarray):
        self.folder, self.affine = folder, affine
        self.image = Volume(np.arange(np.prod(SHAPE)).reshape(1, *SHAPE).astype(np.int16), affine)
        self.slices = series_of(self.image, folder / "ct")
        (folder / "rt").mkdir()
        self.path = folder / "rt" / "1.dcm"

    def write(self, rois, kind: str = "CLOSED_PLANAR", **changes) -> Path:
        """ROIs by name: contours as (points in voxels, slice)."""
        placed = {name: [on_slice(points, k, self.affine) for points, k in contours] for name, contours in rois.items()}
        one = rtstruct(self.slices, placed, kind)
        for name, value in changes.items():
            setattr(one, name, value)
        one.save_as(self.path, enforce_file_format=True)
        return self.path


@pytest.fixture(params=AFFINES)
def drawn(request, tmp_path) -> Drawn:
    return Drawn(tmp_path, AFFINES[request.param])


@pytest.fixture
def plain(tmp_path) -> Drawn:
    return Drawn(tmp_path, AFFINES["axial"])


BALL = [(outline, k) for k in range(SHAPE[2]) if (outline := circle(k)) is not None]


def test_a_ball_is_read_voxel_for_voxel(drawn):
    """In the folder beside its series, in that of its series, and on its image, whatever the file of that."""
    path = drawn.write({"GTV": BALL})
    found = read_mask(path)
    assert found.array.dtype == np.int16 and set(np.unique(found.array)) == {0, 1}
    np.testing.assert_array_equal(found.array[0], ball())
    np.testing.assert_allclose(found.affine, drawn.affine, atol=1e-6)
    np.testing.assert_array_equal(read_mask(path.parent).array, found.array)
    path.rename(drawn.folder / "ct" / "rt.dcm")
    np.testing.assert_array_equal(read_mask(drawn.folder / "ct").array, found.array)
    np.testing.assert_array_equal(read_volume(drawn.folder / "ct").array, drawn.image.array)  # passes over it
    for name in ("image.nii.gz", "image.nrrd"):
        image = drawn.folder / name
        if name.endswith("nrrd"):
            turned = sitk.GetImageFromArray(drawn.image.array[0].T)
            lps = np.diag([-1.0, -1, 1, 1]) @ drawn.affine
            spacing = np.linalg.norm(drawn.affine[:3, :3], axis=0)
            turned.SetSpacing(spacing.tolist())
            turned.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
            turned.SetOrigin(lps[:3, 3].tolist())
            sitk.WriteImage(turned, str(image))
        else:
            write_volume(drawn.image, image)
        alone = drawn.folder / "elsewhere" / "deep" / "rt.dcm"
        alone.parent.mkdir(parents=True, exist_ok=True)
        alone.write_bytes((drawn.folder / "ct" / "rt.dcm").read_bytes())
        np.testing.assert_array_equal(read_mask(alone, like=read_volume(image)).array, found.array)


def test_a_contour_that_is_too_long_for_its_kind_of_number(plain):
    """Beyond 64 KiB an explicit syntax has no DS: it is written as unknown bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom says so
        path = plain.write({"GTV": [(outline, k) for k in range(SHAPE[2]) if (outline := circle(k, 4000)) is not None]})
    contour = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence[5]
    assert contour["ContourData"].VR == "UN"
    np.testing.assert_array_equal(read_mask(path).array[0], ball())


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_holes_and_keyholes(drawn, kind):
    """A box with a hole, as two contours and as one that leads in and out; an island in the hole."""
    outer, inner = box(2.5, 17.5), box(5.5, 13.5)
    keyhole = np.r_[outer, outer[:1], inner[::-1][3:], inner[::-1][:4], outer[:1]]
    slices = range(4, 9)
    nested = [(points, k) for k in slices for points in (inner, outer, box(7.5, 10.5))]
    found = read_mask(drawn.write({"a": nested}, kind)).array[0]
    z = np.indices(SHAPE)[2]
    inside = (z >= 4) & (z < 9)
    np.testing.assert_array_equal(found, (square(2, 18) & ~square(5, 14) | square(7, 11)) & inside)
    found = read_mask(drawn.write({"a": [(keyhole, k) for k in slices]}, kind)).array[0]
    np.testing.assert_array_equal(found, square(2, 18) & ~square(5, 14) & inside)


def test_contours_that_share_a_border_share_no_voxel(plain):
    """Borders through the centers of voxels: each voxel is on one side."""
    left = np.array([(2, 2), (8, 2), (8, 12), (2, 12)])
    right = left + np.array([6, 0])
    rois = {"left": [(left, 3), (left, 4)], "right": [(right, 3), (right, 4)]}
    found = read_mask(plain.write(rois)).array[0]
    assert (found == 1).sum() == (found == 2).sum() == 2 * 6 * 10
    np.testing.assert_array_equal(np.unique(np.argwhere(found == 1)[:, 0]), range(2, 8))
    np.testing.assert_array_equal(np.unique(np.argwhere(found == 2)[:, 0]), range(8, 14))


def test_filling_agrees_with_matplotlib():
    """On stars of many points, beyond the edges of the grid too, and in several pieces."""
    rng = np.random.default_rng(0)
    x, y = np.indices((30, 40))
    centers = np.c_[x.ravel(), y.ravel()].astype(float)
    for _ in range(50):
        points = rng.uniform(-10, 50, (rng.integers(3, 40), 2))
        expected = Polygon(points).contains_points(centers).reshape(30, 40)
        np.testing.assert_array_equal(fill(points, (30, 40)), expected)
    many = np.tile([(0.5, 0.5), (28.5, 0.5), (28.5, 38.5), (0.5, 38.5)], (300_001, 1))  # round and round: odd
    assert fill(many, (30, 40)).sum() == 28 * 38


def test_names_decide_which_and_what(drawn):
    rois = {"GTV": BALL, "Body": [(box(0.5, 18.5), k) for k in range(16)], "Empty": []}
    path = drawn.write(rois)
    with pytest.raises(VolumeError, match=r"'GTV' and 'Body' overlap in \d+ voxels.*label_map"):
        read_mask(path)
    with pytest.warns(UserWarning, match="left out: 2 'Body', 3 'Empty'"):
        np.testing.assert_array_equal(read_mask(path, names={" gtv": 7}).array[0], 7 * ball())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = read_mask(path, names={"gtv": 2, 2: 2, "empty": 3}).array[0]  # one label: the two are joined
    np.testing.assert_array_equal(both == 2, square(0, 19))
    with pytest.raises(VolumeError, match=r"holds 1 'GTV', 2 'Body', 3 'Empty', none .*\('tumor'\).*label_map: \{GTV"):
        read_mask(path, names={"tumor": 1})
    with pytest.raises(VolumeError, match="has no contours of Empty"):
        read_mask(path, names={"empty": 1})


def spoiled(name: str, drawn: Drawn) -> None:
    """Write a file with one fault."""
    first = (box(2.5, 9.5), 3)
    path = drawn.write({"GTV": [first, (box(2.5, 9.5), 4)]})
    one = pydicom.dcmread(path)
    contour = one.ROIContourSequence[0].ContourSequence[0]
    if name == "nan":
        contour.ContourData = ["nan", *list(contour.ContourData)[1:]]
    elif name == "infinite":
        contour.ContourData = ["1e999", *list(contour.ContourData)[1:]]
    elif name == "far":
        contour.ContourData = ["1e300", "1e300", *list(contour.ContourData)[2:]]
    elif name == "count":
        contour.NumberOfContourPoints = 5
    elif name == "odd":
        contour.ContourData = list(contour.ContourData)[:-1]
        del contour.NumberOfContourPoints
    elif name == "no data":
        del contour.ContourData
    elif name == "point":
        contour.ContourGeometricType = "POINT"
    elif name == "open":
        contour.ContourGeometricType = "OPEN_PLANAR"
    elif name == "twice":
        one.StructureSetROISequence[0:0] = [one.StructureSetROISequence[0]]
    elif name == "no ROI":
        one.StructureSetROISequence = []
    elif name == "number 0":
        one.StructureSetROISequence[0].ROINumber = 0
    elif name == "frame":
        one.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3"
        one.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = "1.2.3"
    elif name == "series":
        study = one.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        study.RTReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.4"
    elif name == "no series":
        del one.ReferencedFrameOfReferenceSequence
    elif name == "number":
        one.ROIContourSequence[0].ReferencedROINumber = 9
    elif name == "no number":
        del one.StructureSetROISequence[0].ROINumber
    elif name == "deflated":
        one.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    one.save_as(path)
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif name == "surface":
        one.file_meta.MediaStorageSOPClassUID = SurfaceSegmentationStorage
        one.save_as(path)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nan", "contour 1 of 'GTV': ContourData is"),
        ("infinite", "contour 1 of 'GTV': ContourData is"),
        ("far", r"contour 1 of 'GTV': ContourData is \[1e\+300"),
        ("count", "contour 1 of 'GTV' has 12 numbers for 5 points"),
        ("odd", "contour 1 of 'GTV' has 11 numbers"),
        ("no data", "contour 1 of 'GTV': ContourData is"),
        ("point", "contour 1 of 'GTV' is of type POINT, which encloses nothing"),
        ("open", "contour 1 of 'GTV' is of type OPEN_PLANAR"),
        ("twice", "two of its ROIs have the number 1"),
        ("no ROI", "holds no segments"),
        ("number 0", r"'GTV' has the number 0, which is not a label.*names=\{'GTV': 1\}"),
        ("frame", "its frame of reference is 1.2.3, that of the images"),
        ("series", "was drawn on the series 1.2.4, which is not in .*put the folder of that series beside it"),
        ("no series", "was drawn on no series"),
        ("number", "has no contours of GTV"),
        ("no number", "cannot be read as RTSTRUCT: AttributeError"),
        ("deflated", "is stored as Deflated"),
        ("truncated", "cannot be read as RTSTRUCT"),
        ("surface", "holds surfaces, not voxels"),
    ],
)
def test_files_that_are_refused(plain, fault, reason):
    spoiled(fault, plain)
    with pytest.raises(VolumeError, match=reason) as refused:
        read_mask(plain.path)
    assert str(plain.path) in str(refused.value)
    with pytest.raises(VolumeError, match="is a DICOM .* object, not an image"):
        read_volume(plain.path)


@pytest.mark.parametrize(
    ("contours", "reason"),
    [
        ([(box(2, 9), 3.4)], "contour 1 of 'GTV' is 0.4 voxels away from slice 3"),
        ([(box(2, 9), 16)], "contour 1 of 'GTV' is on slice 16 of 0 to 15"),
        ([(box(2, 9), k) for k in (1, 3, 5, 7)], "'GTV' is drawn on every 2th slice"),
        ([(box(2, 9), 3), (box(5, 12), 3)], "'GTV' on slice 3: two contours cross"),
        ([(box(2, 9), 3), (box(2, 9), 3)], "'GTV' on slice 3: two contours cross each other, or are one"),
    ],
)
def test_contours_that_are_refused(drawn, contours, reason):
    path = drawn.write({"GTV": contours})
    with pytest.raises(VolumeError, match=reason):
        read_mask(path)
    if "cross" in reason:  # an XOR contour says what it means
        read_mask(drawn.write({"GTV": contours}, "CLOSEDPLANAR_XOR"))


def finer(volume: Volume) -> Volume:
    """A grid with three slices for each."""
    affine = volume.affine.copy()
    affine[:3, 2] /= 3
    return Volume(np.zeros((*volume.array.shape[:3], 3 * SHAPE[2]), np.int16), affine)


@pytest.mark.parametrize("slices", [(1, 2), (1, 2, 3, 4), (2,)])
def test_contours_of_thick_slices_are_no_stripes(drawn, slices):
    """They lie on slices of a finer image, but were drawn on their own series."""
    path = drawn.write({"GTV": [(box(2.5, 9.5), k) for k in slices]})
    fine = finer(drawn.image)
    found = read_mask(path, like=fine)
    np.testing.assert_array_equal(found.array, read_mask(path).array)
    assert found.array.any(axis=(0, 1, 2)).nonzero()[0].tolist() == list(slices)
    if len(slices) > 1:
        alone = drawn.folder / "elsewhere" / "deep" / "rt.dcm"
        alone.parent.mkdir(parents=True)
        path.rename(alone)
        with pytest.raises(VolumeError, match="usually 3 slices apart.*put the folder of that series beside it"):
            read_mask(alone, like=fine)
        drawn.write({str(k): [(box(2.5, 9.5), k)] for k in slices})  # a region on each
        np.testing.assert_array_equal(read_mask(path, like=fine).array > 0, found.array)


def test_slices_without_a_contour_are_named(plain):
    """Inner ones; where they are the rule the region is refused, whatever pair is adjacent."""
    path = plain.write({"GTV": [(box(2.5, 9.5), k) for k in (2, 3, 4, 6, 7)]})
    with pytest.warns(UserWarning, match=rf"{path}: 'GTV' has no contour on slices 5 between others") as caught:
        assert not read_mask(path).array[..., 5].any()
    assert len(caught) == 1
    plain.write({"GTV": [(box(2.5, 9.5), k) for k in (1, 4, 7, 8, 11, 14)]})
    with pytest.raises(VolumeError, match="'GTV' is drawn on every 3th slice"):
        read_mask(path)


def test_contours_beside_an_image_are_not_cut_in_silence(plain):
    """On another part of the scan they lie on no voxels; on their own series what is beyond its edge is named."""
    path = plain.write({"GTV": [(box(2.5, 9.5), k) for k in (3, 4)]})
    for away, reason in ((6.0, "'GTV' reaches 3 voxels beyond its edge"), (1000.0, "'GTV' lies beside its voxels")):
        affine = plain.affine.copy()
        affine[0, 3] += away
        part = Volume(plain.image.array, affine)
        np.testing.assert_array_equal(read_mask(path, like=part).affine, read_mask(path).affine)  # that of its series
        alone = plain.folder / "elsewhere" / "deep" / "rt.dcm"
        alone.parent.mkdir(parents=True, exist_ok=True)
        alone.write_bytes(path.read_bytes())
        with pytest.raises(VolumeError, match=reason):
            read_mask(alone, like=part)
    plain.write({"couch": [(box(2.5, 30.5), k) for k in (3, 4)]})
    with pytest.warns(UserWarning, match=r"'couch' reaches 11 voxels beyond its images, and is cut there"):
        assert read_mask(path).array.any()
    plain.write({"seed": [(box(2.2, 2.4), k) for k in (3, 4)]})
    with pytest.warns(UserWarning, match="'seed' holds the center of no voxel"):
        assert not read_mask(path).array.any()


def test_a_series_that_is_there_twice_and_two_objects(plain):
    path = plain.write({"GTV": BALL})
    (plain.folder / "rt" / "2.dcm").write_bytes(path.read_bytes())
    with pytest.raises(VolumeError, match=r"holds 2 segmentation objects, 1.dcm \(RTSTRUCT\), 2.dcm"):
        read_mask(path.parent)
    (plain.folder / "copy").mkdir()
    for one in (plain.folder / "ct").iterdir():
        (plain.folder / "copy" / one.name).write_bytes(one.read_bytes())
    with pytest.raises(VolumeError, match="is there 2 times"):
        read_mask(path)
    other = Volume(plain.image.array, oblique())
    with pytest.raises(VolumeError, match="is there 2 times"):
        read_mask(path, like=other)  # it does not lie there
    np.testing.assert_array_equal(read_mask(path, like=plain.image).array[0], ball())


def test_a_data_set_of_patients(tmp_path):
    """Images by series, masks by RTSTRUCT of other names a patient; the labels are the config's."""
    for name, roi in (("a", "GTV_Mass"), ("b", "tumor"), ("c", "Tumor ")):
        (tmp_path / name).mkdir()
        Drawn(tmp_path / name, AFFINES["oblique"]).write({"Body": [(box(1, 9), 2)], roi: BALL})
    config = DataConfig(
        root=str(tmp_path),
        images="{subject}/ct",
        masks="{subject}/rt/*.dcm".replace("*", "1"),
        subject="subject",
        label_names={0: "background", 4: "tumor"},
        label_map={"GTV_Mass": 4},
        validation_fraction=0,
    )
    with pytest.warns(UserWarning, match="left out: 1 'Body'"):
        dataset = VolumeDataset(load_cases(config), config)
    for item in dataset:
        np.testing.assert_array_equal(item["mask"].numpy(), ball())
    with pytest.raises(ValueError, match=r"data: label_map leads from 'a' to 4, and from 4 to 0"):
        DataConfig(images="x", label_names={0: "b", 4: "t"}, label_map={"a": 4, 4: 0})
    with pytest.raises(ValueError, match=r"data: label_map leads from 'A' to 4 and to 0"):
        DataConfig(images="x", label_names={0: "b", 4: "t"}, label_map={"a": 0, "A": 4})
