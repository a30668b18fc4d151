"""Generated label maps as DICOM-SEG: marked as synthetic, valid, and read again as they were."""

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from structures import oblique

from pipelines import MedVolumePipeline, write_synthetic
from pipelines.storage import to_dicom
from volumes import PADDING, Volume, read_mask, read_volume, to_nibabel, write_dicom, write_seg, write_volume
from volumes.formats import dicom_seg_out

RECORD = {"synthetic": True, "software": "medvolume 1", "model": "ab" * 32, "seed": 5, "mask": None}
LABELS = {0: "background", 2: "anterior", 5: "Hippocampus", 7: "absent"}
MADE = {"software": "medvolume 1", "model": "ab" * 32, "seed": 5}
ROOT = Path(__file__).parents[2]


def label_map() -> Volume:
    """Two of three labels, empty slices at both ends and between."""
    array = np.zeros((1, 5, 6, 9), np.int16)
    array[0, 1:4, 2:5, 2:4], array[0, 0, 0, 3] = 2, 2
    array[0, 3:, 1:4, 6:8] = 5
    return Volume(array, oblique())


def test_without_the_extra_a_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(dicom_seg_out.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs highdicom.*pip install -e "\.\[dicomseg\]" -c constraints.txt'):
        write_seg(label_map(), tmp_path / "out", labels=LABELS, **MADE)
    assert not list(tmp_path.iterdir())


class TestWithHighdicom:
    """What needs the extra dicomseg."""

    @pytest.fixture(autouse=True)
    def _highdicom(self):
        self.hd = pytest.importorskip("highdicom", reason="the extra dicomseg is not installed")

    @pytest.mark.parametrize("beside", [False, True])
    def test_it_is_read_again_as_it_was(self, tmp_path, beside):
        mask = label_map()
        series = tmp_path / "series" if beside else None
        if series is not None:
            image = mask.replace(np.arange(270, dtype=np.int16).reshape(mask.array.shape))
            write_dicom(image, series, modality="MR", **MADE)
        path = write_seg(mask, tmp_path / "seg", labels=LABELS, series=series, **MADE)
        names = {"anterior": 2, "hippocampus": 5, "absent": 7}
        for found in (read_mask(path, names=names), read_mask(path.parent, names=names)):
            np.testing.assert_array_equal(found.array, mask.array)
            np.testing.assert_allclose(found.affine, mask.affine, atol=1e-6)
        np.testing.assert_array_equal(read_mask(path).array, np.select([mask.array == 2, mask.array == 5], [1, 2]))
        theirs = self.hd.seg.segread(path)
        assert [s.segment_label for s in map(theirs.get_segment_description, (1, 2, 3))] == [*LABELS.values()][1:]
        assert theirs.get_volume(segment_numbers=[2]).array.sum() == (mask.array == 5).sum()
        one = pydicom.dcmread(path)
        frames = {bool(series): len(one.PerFrameFunctionalGroupsSequence)}
        assert frames == ({True: 4} if beside else {False: 3 * 9})
        if series is None:  # nothing is named that exists nowhere
            assert "ReferencedSeriesSequence" not in one and b"DerivationImage" not in path.read_bytes()
            assert "1.2.840.10008.5.1.4.1.1.7" not in str(one)
        else:
            first = pydicom.dcmread(series / "0001.dcm")
            for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
                assert one[name].value == first[name].value
            assert one.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
            np.testing.assert_array_equal(read_volume(series).array, image.array)

    def test_it_says_that_it_is_synthetic(self, tmp_path):
        one = pydicom.dcmread(write_seg(label_map(), tmp_path / "seg", labels=LABELS, **MADE))
        assert one.SyntheticData == "YES" and one.ContentQualification == "RESEARCH"
        for words in ("SYNTHETIC", "shows no patient", "medvolume 1", "ab" * 32, "seed 5"):
            assert words in one.ImageComments
        assert str(one.PatientName) == "SYNTHETIC^MEDVOLUME" and str(one.PatientID).startswith("SYNTHETIC-")
        assert not one.PatientBirthDate and not one.PatientSex and not one.StudyDate
        assert {s.SegmentAlgorithmType for s in one.SegmentSequence} == {"AUTOMATIC"}
        types = [s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for s in one.SegmentSequence]
        assert types == ["Tissue", "Hippocampus", "Tissue"]
        assert [s.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for s in one.SegmentSequence] == [
            "Tissue",
            "Anatomical Structure",
            "Tissue",
        ]

    def test_what_cannot_be_written_is_refused(self, tmp_path):
        mask, out = label_map(), tmp_path / "out"
        with pytest.raises(ValueError, match=r"holds \[5\], which have no name"):
            write_seg(mask, out, labels={0: "b", 2: "a"}, **MADE)
        with pytest.raises(ValueError, match="is background everywhere"):
            write_seg(mask.replace(0 * mask.array), out, labels=LABELS, **MADE)
        with pytest.raises(ValueError, match="one label map of whole numbers"):
            write_seg(mask.replace(mask.array / 2), out, labels=LABELS, **MADE)
        sheared = mask.affine.copy()
        sheared[:3, 1] += 0.1 * sheared[:3, 0]
        with pytest.raises(ValueError, match="degrees apart instead of 90"):
            write_seg(Volume(mask.array, sheared), out, labels=LABELS, **MADE)
        write_dicom(Volume(mask.array, np.eye(4)), tmp_path / "other", modality="MR", **MADE)
        with pytest.raises(ValueError, match="lies on another grid than the label map"):
            write_seg(mask, out, labels=LABELS, series=tmp_path / "other", **MADE)
        files = write_dicom(mask, tmp_path / "real", modality="MR", **MADE)
        one = pydicom.dcmread(files[3])
        del one.SyntheticData
        one.save_as(files[3])
        with pytest.raises(ValueError, match="slice 4 is not marked as synthetic"):
            write_seg(mask, out, labels=LABELS, series=tmp_path / "real", **MADE)
        assert not out.exists()
        write_seg(mask, out, labels=LABELS, **MADE)
        with pytest.raises(ValueError, match="is there already"):
            write_seg(mask, out, labels=LABELS, **MADE)

    def test_what_is_outside_the_field_of_view_is_background(self, tmp_path):
        mask = label_map()
        mask.array[0, 4, 5] = PADDING
        path = write_seg(mask, tmp_path / "seg", labels=LABELS, **MADE)
        found = read_mask(path, names={"anterior": 2, "hippocampus": 5, "absent": 7})
        np.testing.assert_array_equal(found.array, mask.array.clip(0))

    def test_names_that_are_one_when_cut_are_refused(self, tmp_path):
        labels = {0: "background", 2: "x" * 64 + "a", 5: "x" * 64 + "b"}
        with pytest.raises(ValueError, match=r"the names of the labels 2 .* and 5 .* are one in the 64 characters"):
            write_seg(label_map(), tmp_path / "seg", labels=labels, **MADE)
        labels[5] = "y" * 70
        assert write_seg(label_map(), tmp_path / "seg", labels=labels, **MADE).is_file()

    def test_the_command_takes_names_from_the_pipeline(self, tmp_path, capsys):
        """Of the shipped pipeline of label maps; only maps with a sidecar."""
        mask = label_map()
        mask.array[mask.array == 5] = 1
        path = tmp_path / "map_000.nii.gz"
        write_synthetic(to_nibabel(mask), RECORD, path)
        command = [str(path), "--output", str(tmp_path / "out"), "--modality"]
        folder = ROOT / "weights" / "hippocampus-masks"
        pipeline = ["--pipeline", str(folder)]
        with pytest.raises(ValueError, match="map_000.nii.gz: was generated by model abababababab, and --pipeline"):
            to_dicom.main([*command, "SEG", *pipeline])
        assert not (tmp_path / "out").exists()
        model = MedVolumePipeline.from_pretrained(folder).model_hash
        write_synthetic(to_nibabel(mask), RECORD | {"model": model}, path)
        to_dicom.main([*command, "SEG", *pipeline])
        assert "map_000/seg.dcm" in capsys.readouterr().out.replace("\\", "/")
        found = read_mask(tmp_path / "out" / "map_000", names={"anterior": 1, "posterior": 2})
        np.testing.assert_array_equal(found.array, mask.array)
        for wrong in (["SEG"], ["MR", *pipeline], ["MR", "--series", str(tmp_path)]):
            with pytest.raises(SystemExit):
                to_dicom.main([*command, *wrong])
        (tmp_path / "model_index.json").write_text(json.dumps({"data": {}}))
        for folder, reason in ((tmp_path / "none", "holds no model_index.json"), (tmp_path, "data has no")):
            with pytest.raises(ValueError, match=reason):
                to_dicom.main([*command, "SEG", "--pipeline", str(folder)])
        write_volume(mask, tmp_path / "real.nii.gz")
        with pytest.raises(ValueError, match="not known to be synthetic"):
            to_dicom.main([str(tmp_path / "real.nii.gz"), "--output", str(tmp_path), "--modality", "SEG", *pipeline])
