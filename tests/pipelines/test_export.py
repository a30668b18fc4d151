"""--export: data sets of generated pairs that nnU-Net and BIDS tools read, as their specifications ask."""

import csv
import json
import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from tiny import mask_image, tiny_pipeline

import generate
from pipelines import MedVolumePipeline
from pipelines.export import folder as export_folder
from pipelines.export.bids import place_of, subjects
from pipelines.export.folder import mask_of
from pipelines.export.nnunet import label_values
from pipelines.inputs.masks import describe_mask
from pipelines.inputs.request import VolumeRequest
from pipelines.storage.finished import FinishedVolume, finished_volumes
from recipes.proposals.machine import Machine
from recipes.survey import Options, look_over
from volumes import DataConfig, VolumeDataset, load_cases, read_mask, read_volume

SHAPES = {"a": (8, 8, 8), "b": (7, 8, 5)}
CT = {"kind": "window", "low": -1000.0, "high": 1000.0}
PET = {"kind": "percentile", "low": 0.0, "high": 20.0, "percentiles": [0.0, 100.0]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline of two channels, and masks that are not in RAS order, one with voxels outside the field of view."""
    folder = tmp_path_factory.mktemp("export")
    tiny_pipeline(channels=["CT", "t1"], intensity=[CT, PET]).save_pretrained(folder / "pipeline")
    (folder / "masks").mkdir()
    for seed, (stem, shape) in enumerate(SHAPES.items()):
        image = mask_image(shape, np.diag([-1.0, 1, 2, 1]), seed)
        array = np.asarray(image.dataobj).copy()
        array[0, 0, 0] = -1
        nib.save(nib.Nifti1Image(array, image.affine), folder / "masks" / f"{stem}.nii.gz")
    return folder


def run(place, output, *more):
    settings = ["--pipeline", str(place / "pipeline"), "--masks", str(place / "masks"), "--steps", "1", "--count", "2"]
    generate.main([*settings, "--output", str(output), *map(str, more)])


@pytest.fixture(scope="module")
def generated(place):
    """A finished run, and its exports."""
    output = place / "generated"
    run(place, output)
    run(place, output, "--export", "nnunet", place / "Dataset501_Tiny", "--export", "bids", place / "bids")
    return output


def test_nnunet_gets_what_it_asks_for(place, generated):
    """documentation/dataset_format.md and verify_dataset_integrity of nnU-Net."""
    folder = place / "Dataset501_Tiny"
    content = json.loads((folder / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT", "1": "t1"}
    assert content["labels"] == {"background": 0, "anterior": 1, "posterior": 2}
    assert content["label_map"] == {"0": 0, "2": 1, "5": 2}
    assert content["numTraining"] == 4 and content["file_ending"] == ".nii.gz"
    assert content["synthetic"] is True and content["description"].startswith("Synthetic")
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").iterdir())
    assert cases == ["a_000", "a_001", "b_000", "b_001"]
    assert {path.name for path in (folder / "imagesTr").iterdir()} == {
        f"{case}_{channel:04d}.nii.gz" for case in cases for channel in range(2)
    }
    for case in cases:
        label = nib.load(folder / f"labelsTr/{case}.nii.gz")
        for number, channel in enumerate(("CT", "t1")):
            image = nib.load(folder / f"imagesTr/{case}_{number:04d}.nii.gz")
            assert image.shape == label.shape and np.allclose(image.affine, label.affine)
            original = generated / f"{case}_{channel}.nii.gz"
            assert os.path.samefile(folder / f"imagesTr/{case}_{number:04d}.nii.gz", original)
        mask = np.asarray(nib.load(place / "masks" / f"{case[0]}.nii.gz").dataobj)
        expected = np.select([mask == 2, mask == 5], [1, 2], 0)  # and background outside the field of view
        np.testing.assert_array_equal(np.asarray(label.dataobj), expected)
        sidecar, record = (
            json.loads(p.read_text()) for p in (folder / f"sidecars/{case}.json", generated / f"{case}.json")
        )
        assert sidecar == {key: value for key, value in record.items() if key != "files"}
        assert sidecar["synthetic"] is True and sidecar["model"] == content["models"][0]


def test_our_own_loader_reads_the_sets_back(place, generated):
    config = DataConfig(
        root=str(place / "Dataset501_Tiny"),
        images={"CT": "imagesTr/{case}_0000.nii.gz", "t1": "imagesTr/{case}_0001.nii.gz"},
        masks="labelsTr/{case}.nii.gz",
        label_names={0: "background", 1: "anterior", 2: "posterior"},
        validation_fraction=0,
    )
    data = VolumeDataset(load_cases(config), config)
    assert len(data) == 4 and set(np.unique(data[0]["mask"])) == {0, 1, 2}
    config = DataConfig(
        root=str(place / "bids"),
        table="participants.tsv",
        images="{participant_id}/anat/{participant_id}_T1w.nii.gz",
        masks="derivatives/labels/{participant_id}/ct/{participant_id}_dseg.nii.gz",
        label_names={0: "background", 2: "anterior", 5: "posterior"},
        validation_fraction=0,
    )
    cases = load_cases(config)
    assert [case.metadata["volume"] for case in cases] == ["a_000", "a_001", "b_000", "b_001"]
    assert len(VolumeDataset(cases, config)) == 4


def test_init_recognizes_the_sets(place, generated, tmp_path):
    """`medvolume init` finds channels, masks and labels in both."""
    options = Options(place / "Dataset501_Tiny", tmp_path / "nnunet", quick=True)
    survey = look_over(options, Machine(2, 16 * 2**30))
    assert survey.layout.name == "nnU-Net"
    assert survey.section.settings["label_names"] == {0: "background", 1: "anterior", 2: "posterior"}
    assert len(survey.choice.keys) == 4
    survey = look_over(Options(place / "bids", tmp_path / "bids", quick=True), Machine(2, 16 * 2**30))
    assert survey.layout.name == "BIDS" and len(survey.choice.keys) == 4
    assert {channel.name for channel in survey.choice.channels} == {"ct", "t1w"} and survey.section.settings.get(
        "masks"
    )


def test_bids_gets_what_it_asks_for(place, generated):
    folder = place / "bids"
    for home, kind in ((folder, "raw"), (folder / "derivatives/labels", "derivative")):
        content = json.loads((home / "dataset_description.json").read_text())
        assert content["Name"] and content["BIDSVersion"] and content["DatasetType"] == kind
        assert content["GeneratedBy"][0]["Name"] == "medvolume" and content["synthetic"] is True
        assert content["GeneratedBy"][0]["Description"].startswith("Synthetic")
    rows = list(csv.DictReader((folder / "participants.tsv").open(), delimiter="\t"))
    assert [row["participant_id"] for row in rows] == ["sub-a000", "sub-a001", "sub-b000", "sub-b001"]
    assert set(rows[0]) - {"participant_id"} == set(json.loads((folder / "participants.json").read_text()))
    seeds = [json.loads((generated / f"{row['volume']}.json").read_text())["seed"] for row in rows]
    assert [row["seed"] for row in rows] == list(map(str, seeds))
    for row in rows:
        subject = row["participant_id"]
        assert os.path.samefile(
            folder / f"{subject}/anat/{subject}_T1w.nii.gz", generated / f"{row['volume']}_t1.nii.gz"
        )
        sidecar = json.loads((folder / f"{subject}/anat/{subject}_T1w.json").read_text())
        assert sidecar["synthetic"] is True and sidecar["seed"] == int(row["seed"]) and sidecar["channel"] == "t1"
        image = read_volume(folder / f"{subject}/ct/{subject}_ct.nii.gz")
        labels = read_mask(folder / f"derivatives/labels/{subject}/ct/{subject}_dseg.nii.gz")
        assert image.shape == labels.shape and np.allclose(image.affine, labels.affine)
        assert set(np.unique(labels.array)) == {0, 2, 5}
    assert (folder / "derivatives/labels/dseg.tsv").read_text().split() == [
        *("index", "name", "0", "background", "2", "anterior", "5", "posterior")
    ]
    assert "*_ct.*" in (folder / ".bidsignore").read_text().split() and (folder / "README").read_text().startswith(
        "Synthetic"
    )


def test_an_export_of_a_finished_run_generates_nothing(place, generated, monkeypatch, tmp_path):
    """Again, and elsewhere where the disk has no hard links: copies, which a further export links."""
    monkeypatch.setattr(MedVolumePipeline, "generate", None)
    before = {path: path.read_bytes() for path in sorted((place / "Dataset501_Tiny").rglob("*.json"))}
    run(place, generated, "--export", "nnunet", place / "Dataset501_Tiny")
    assert {path: path.read_bytes() for path in sorted((place / "Dataset501_Tiny").rglob("*.json"))} == before
    target, link = tmp_path / "Dataset502_Copies", os.link

    def other_disk(source, place_of_link, **options):
        if str(generated) in str(source):
            raise OSError(18, "Invalid cross-device link")
        link(source, place_of_link, **options)

    monkeypatch.setattr(export_folder.os, "link", other_disk)
    run(place, generated, "--export", "nnunet", target)
    copy = target / "imagesTr/a_000_0000.nii.gz"
    assert copy.read_bytes() == (generated / "a_000_CT.nii.gz").read_bytes()
    assert not os.path.samefile(copy, generated / "a_000_CT.nii.gz")
    inode = copy.stat().st_ino
    run(place, generated, "--export", "nnunet", target)
    assert copy.stat().st_ino == inode  # linked from the earlier export, not copied again


def test_an_interrupted_export_leaves_nothing_half(place, generated, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    target = tmp_path / "Dataset501_Half"
    monkeypatch.setattr(export_folder.ExportFolder, "add_mask", stop)
    with pytest.raises(KeyboardInterrupt):
        run(place, generated, "--export", "nnunet", target)
    assert not target.exists()
    monkeypatch.undo()
    run(place, generated, "--export", "nnunet", target)
    assert json.loads((target / "dataset.json").read_text())["numTraining"] == 4


def test_other_folders_are_refused_before_any_work(place, generated, tmp_path, monkeypatch):
    monkeypatch.setattr(MedVolumePipeline, "generate", None)
    (tmp_path / "Dataset501_Theirs").mkdir()
    (tmp_path / "Dataset501_Theirs" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an exported data set"):
        run(place, tmp_path / "out", "--export", "nnunet", tmp_path / "Dataset501_Theirs")
    ours = tmp_path / "Dataset501_Ours"
    shutil.copytree(place / "Dataset501_Tiny", ours)
    with pytest.raises(ValueError, match="holds volumes of another command, such as a_001"):
        run(place, tmp_path / "out", "--export", "nnunet", ours, "--count", "1")
    with pytest.raises(ValueError, match=r"was exported in another format \(nnunet\)"):
        run(place, tmp_path / "out", "--export", "bids", ours)
    (ours / "imagesTr" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds imagesTr/notes.txt, which the export did not write"):
        run(place, tmp_path / "out", "--export", "nnunet", ours)
    for name in ("Tiny", "Dataset1_Tiny", "Dataset000_Tiny", "Dataset501_ä"):
        with pytest.raises(ValueError, match="names such as Dataset501_Synthetic"):
            run(place, tmp_path / "out", "--export", "nnunet", tmp_path / name)
    with pytest.raises(ValueError, match="nifti: is not a format; give nnunet or bids"):
        run(place, tmp_path / "out", "--export", "nifti", tmp_path / "set")
    with pytest.raises(ValueError, match="the output .* lies in it"):
        run(place, tmp_path / "Dataset501_A/out", "--export", "nnunet", tmp_path / "Dataset501_A")
    assert not (tmp_path / "out").exists()


def test_exports_in_the_way_of_each_other_are_refused(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    bids, nnunet = ("--export", "bids"), ("--export", "nnunet")
    one = tmp_path / "sets/Dataset501_A"
    for words, said in (
        ([*bids, one, *nnunet, one], "Dataset501_A: is, holds or lies in .*Dataset501_A, the folder of another"),
        ([*bids, tmp_path / "bids", *nnunet, tmp_path / "bids/Dataset501_A"], "lies in .*bids, the folder of another"),
        ([*nnunet, one, *bids, tmp_path / "x/../sets"], "is, holds or lies in .*Dataset501_A, the folder of another"),
        ([*bids, tmp_path / "file/sets/bids"], "file is a file, not a folder; give another folder"),
        ([*bids, tmp_path / "file"], "file is a file, not a folder; give another folder"),
    ):
        with pytest.raises(ValueError, match=said):
            run(place, tmp_path / "runs/out", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_exports_of_generated_masks_are_checked_first(place, tmp_path):
    """Before the masks are generated, which may take hours."""
    names = {
        "image_labels": {"0": "background", "2": "anterior", "5": "posterior"},
        "channels": ["anterior", "posterior"],
    }
    scale = {"kind": "window", "low": 0.0, "high": 1.0}
    tiny_pipeline(num_labels=0, labels={}, intensity=[scale, scale], **names).save_pretrained(tmp_path / "maps")
    command = ["--pipeline", str(place / "pipeline"), "--masks", f"generate:{tmp_path / 'maps'}"]
    command += ["--shape", "8", "8", "8", "--steps", "1"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes.txt").write_text("mine")
    for export, said in (
        (("nifti", tmp_path / "set"), "nifti: is not a format"),
        (("nnunet", tmp_path / "set"), "names such as Dataset501_Synthetic"),
        (("bids", tmp_path / "theirs"), "holds something else than an exported data set"),
        (("bids", tmp_path / "out/masks"), "the output .* lies in it"),
    ):
        with pytest.raises(ValueError, match=said):
            generate.main([*command, "--output", str(tmp_path / "out"), "--export", *map(str, export)])
    assert not (tmp_path / "out").exists()


def test_a_mask_that_changed_is_refused(place, generated, tmp_path):
    """The label map beside a volume is the one that it was generated from."""
    mask = tmp_path / "a.nii.gz"
    nib.save(mask_image((8, 8, 8), seed=5), mask)
    path, record = next(finished_volumes(generated))
    data = MedVolumePipeline.from_pretrained(place / "pipeline").data
    with pytest.raises(ValueError, match=r"a.nii.gz: changed after .* was generated from it"):
        mask_of(FinishedVolume(path, record, VolumeRequest(mask)), data)


def test_masks_known_in_part_are_refused_before_any_work(tmp_path, monkeypatch):
    """The volume shows structures where its label map would lack them. Other masks of such a model are exported."""
    monkeypatch.setattr(MedVolumePipeline, "generate", None)
    tiny_pipeline(partial_masks=0.2).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "masks").mkdir()
    array = np.asarray(mask_image((8, 8, 8)).dataobj).copy()
    array[0, 0, :3] = 255
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "masks" / "part.nii.gz")
    for kind, folder in (("nnunet", "Dataset501_A"), ("bids", "bids")):
        words = ["--label_map", "255=unknown", "--export", kind, tmp_path / folder]
        with pytest.raises(ValueError, match=r"part.nii.gz: the label of 3 voxels is unknown \(-2\).*leave out"):
            run(tmp_path, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    data = MedVolumePipeline.from_pretrained(tmp_path / "pipeline").data
    for target in ("unknown", 5):
        request = VolumeRequest(tmp_path / "masks" / "part.nii.gz", label_map={255: target})
        path, record = tmp_path / "part_000.nii.gz", SimpleNamespace(mask=describe_mask(request.mask), box=None)
        with pytest.raises(ValueError, match="label of 3 voxels") if target == "unknown" else nullcontext():
            assert set(np.unique(mask_of(FinishedVolume(path, record, request), data).array)) == {0, 2, 5}


def test_volumes_without_masks_are_for_bids_alone(tmp_path):
    tiny_pipeline(num_labels=0, labels={}).save_pretrained(tmp_path / "pipeline")
    settings = ["--pipeline", str(tmp_path / "pipeline"), "--shape", "8", "8", "8", "--steps", "1"]
    settings += ["--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="volume has no mask, and nnU-Net learns from pairs"):
        generate.main([*settings, "--export", "nnunet", str(tmp_path / "Dataset501_A")])
    generate.main([*settings, "--export", "bids", str(tmp_path / "bids")])
    assert (tmp_path / "bids/sub-volume000/anat/sub-volume000_acq-MR_image.nii.gz").is_file()
    assert not (tmp_path / "bids/derivatives").exists()


def test_labels_become_consecutive():
    assert label_values({0: "background", 1: "a", 2: "b"}) == ({"background": 0, "a": 1, "b": 2}, {0: 0, 1: 1, 2: 2})
    names, values = label_values({0: "air", 4: "lesion", 9: "lesion", 12: "ignore", 20: "background"})
    assert values == {0: 0, 4: 1, 9: 2, 12: 3, 20: 4}
    assert names == {"background": 0, "lesion_4": 1, "lesion_9": 2, "ignore_12": 3, "background_20": 4}
    assert label_values({1: "background", 2: "liver"})[1] == {1: 0, 2: 1}
    assert label_values({3: "liver", 5: "spleen"}) == ({"background": 0, "liver": 1, "spleen": 2}, {0: 0, 3: 1, 5: 2})


def test_names_in_bids():
    assert subjects(["p_01_000", "ü2"]) == {"p_01_000": "sub-p01000", "ü2": "sub-2"}
    with pytest.raises(ValueError, match="a_b and ab would both be sub-ab"):
        subjects(["a_b", "ab"])
    with pytest.raises(ValueError, match="has no letter or digit"):
        subjects(["__"])
    assert place_of("T1ce") == ("anat", "_ce-gadolinium", "T1w") and place_of("FLAIR") == ("anat", "", "FLAIR")
    assert place_of("my MR") == ("anat", "_acq-myMR", "image")
