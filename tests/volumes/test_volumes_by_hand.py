"""Scales, labels, NRRD headers, splits and overlaps that are known by hand."""

import nibabel as nib
import numpy as np
import pytest

from volumes import Case, DataConfig, IntensityScaling, VolumeDataset, load_cases, read_volume
from volumes.data.patterns import is_wanted
from volumes.data.subjects import find_overlap, marks_of, record_subjects
from volumes.map_checks import LabelMapStats, LabelStats, count_at_edge, count_pieces, label_map_fault
from volumes.plausible import obliqueness, resampling_oddities


def test_percentiles_are_of_each_channel_by_itself(tmp_path):
    """T1 from 0 to 510 and T2 from 1000 to 4060: neither range is in the other."""
    ramp = np.arange(512, dtype=np.float32).reshape(8, 8, 8) - 1
    ramp[0, 0, 0] = 0
    for name, array in (("t1", ramp), ("t2", 1000 + 6 * ramp)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"a_{name}.nii")
    images = {"T1": "{case}_t1.nii", "T2": "{case}_t2.nii"}
    scaling = IntensityScaling("percentile", 0, 100)
    config = DataConfig(root=str(tmp_path), images=images, intensity=scaling, validation_fraction=0)
    item = VolumeDataset(load_cases(config), config)[0]
    assert item["scale"].tolist() == [[0, 510], [1000, 4060]]
    np.testing.assert_allclose(item["image"][0], item["image"][1], atol=1e-6)
    assert (item["image"].amin(), item["image"].amax()) == (-1, 1)


def test_a_mask_at_another_spacing_has_the_labels_that_it_had(tmp_path):
    labels = np.random.default_rng(0).choice([0, 9], (6, 6, 6)).astype(np.uint8)
    image = np.arange(216, dtype=np.float32).reshape(6, 6, 6)
    for name, array in (("image", image), ("mask", labels)):
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 2, 1])), tmp_path / f"{name}.nii")
    names = {value: f"label {value}" for value in range(10)}
    settings = {"images": "image.nii", "masks": "mask.nii", "label_names": names, "validation_fraction": 0}
    config = DataConfig(root=str(tmp_path), spacing=(0.8, 1.0, 1.0), **settings)
    mask = VolumeDataset(load_cases(config), config)[0]["mask"]
    assert mask.shape == (8, 6, 12) and mask.unique().tolist() == [0, 9]


def test_who_must_not_judge_a_model_is_known_by_split_and_role():
    """Whoever was learned from judges nothing; whoever chose the model does not test it, and may choose again."""
    config = DataConfig(images="{case}.nii", subject="case")
    cases = [Case("a", "A", split) for split in ("train", "validation", "test")]
    for role, expected in (("train", ["validation", "test"]), ("validation", ["test"])):
        records = [record_subjects({role: [marks_of(cases[0], config)]})]
        found = find_overlap(records, cases, config)
        assert [(one.case.split, one.role) for one in found] == [(split, role) for split in expected]


def test_letter_case_spaces_and_accents_make_no_other_subject():
    config = DataConfig(images="{case}.nii", subject="case")
    marks = [
        marks_of(Case(name, name, "train"), config)
        for name in ("M\u00fcller", " m\u00dcller ", "Mu\u0308ller", "Muller")
    ]
    assert marks[0] == marks[1] == marks[2] != marks[3]


def write_nrrd(path, array: np.ndarray, space: str, directions: str) -> None:
    head = f"NRRD0004\ntype: short\ndimension: {array.ndim}\nendian: little\nencoding: raw\nspace: {space}\n"
    head += f"sizes: {' '.join(map(str, array.shape))}\nspace directions: {directions}\nspace origin: (1,2,3)\n\n"
    path.write_bytes(head.encode() + array.astype("<i2").tobytes("F"))


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("RAS", (1, 1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("LAS", (-1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
        ("LPS", (-1, -1, 1)),
        ("left-posterior-superior", (-1, -1, 1)),
    ],
)
def test_a_nrrd_space_says_where_its_axes_lead(space, signs, tmp_path):
    """The first voxel lies at (1, 2, 3) of the file's space, and the next along each axis 1, 2 and 3 mm on."""
    array = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    write_nrrd(tmp_path / "a.nrrd", array, space, "(1,0,0) (0,2,0) (0,0,3)")
    found = read_volume(tmp_path / "a.nrrd")
    assert found.spacing == (1, 2, 3) and (np.diag(found.affine) > 0).all()
    for stored in ((0, 0, 0), (1, 0, 0), (2, 3, 4)):
        place = np.array(signs) * (np.array([1, 2, 3]) + np.array(stored) * [1, 2, 3])
        index = np.rint(np.linalg.inv(found.affine) @ [*place, 1])[:3].astype(int)
        assert found.array[0][tuple(index)] == array[stored]


def test_channels_of_a_nrrd_may_come_first_or_last(tmp_path):
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    write_nrrd(tmp_path / "first.nrrd", array, "RAS", "none (1,0,0) (0,1,0) (0,0,1)")
    write_nrrd(tmp_path / "last.nrrd", np.moveaxis(array, 0, -1), "RAS", "(1,0,0) (0,1,0) (0,0,1) none")
    for name in ("first.nrrd", "last.nrrd"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, array)


@pytest.mark.parametrize("seed", range(6))
def test_a_subject_in_two_splits_is_refused_before_validation(seed, tmp_path):
    """Also where it is drawn: all its volumes would move to validation, those of the test split too."""
    rows = ["name,who,fold", "a1,A,train", "a2,A,test", "b1,B,train", "c1,C,test"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    for row in rows[1:]:
        (tmp_path / f"{row[:2]}.nii").touch()
    table = {"root": str(tmp_path), "table": "table.csv", "images": "{name}.nii", "subject": "who", "split": "fold"}
    with pytest.raises(ValueError, match="subject A is in two splits"):
        load_cases(DataConfig(**table, validation_fraction=0.5, split_seed=seed))


def test_a_label_may_have_half_the_least_and_twice_the_most():
    """Half the least volume and twice the greatest are still plausible."""
    known = LabelMapStats({"a": LabelStats((16, 32), pieces=1, edge=0, always=True)}, 1, ((9, 9, 9),))
    for voxels, right in ((3, False), (4, True), (32, True), (33, False)):
        array = np.zeros((9, 36, 9), np.uint8)
        array[4, 1 : 1 + voxels, 4] = 1
        assert (label_map_fault(array, 2.0, {0: "background", 1: "a"}, known) is None) == right, voxels


def test_voxels_count_at_both_edges_and_touch_at_corners():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 1, 1] = mask[1, 2, 2] = mask[2, 3, 3] = True
    assert count_at_edge(mask) == 2 and count_pieces(mask) == 1


@pytest.mark.parametrize("second", [(1, 0, 0), (1, 1, 0), (1, 1, 1)])
def test_voxels_sharing_face_edge_or_corner_are_one_piece(second):
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 1, 1] = True
    mask[tuple(1 + np.array(second))] = True
    assert count_pieces(mask) == 1
    assert count_pieces(np.pad(mask, ((0, 0), (0, 0), (0, 4))) | np.pad(mask, ((0, 0), (0, 0), (4, 0)))) == 2


def test_ten_degrees_about_an_axis_are_ten_at_any_spacing():
    angle = np.radians(10)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.0, 2.0, 5.0])
    assert obliqueness(affine) == pytest.approx(10, abs=1e-9)


def test_half_of_an_axis_is_little_and_more_is_not():
    assert len(resampling_oddities((14, 20, 20), (7, 20, 20))) == 1
    assert resampling_oddities((13, 20, 20), (7, 20, 20)) == [] == resampling_oddities((16, 20, 20), (8, 20, 20))


def test_a_star_stays_in_its_folder():
    wanted = is_wanted("images/*.nii")
    assert wanted("images/a.nii") and not wanted("images/more/a.nii")
