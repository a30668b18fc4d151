"""generate.py and demo.py: the same volumes whatever the batch, the order, the processes and the interruptions."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from compared import assert_same, voxels
from tiny import mask_image, tiny_pipeline

import demo
import generate
from benchmarks import forked
from pipelines import MedVolumePipeline, VolumeProcessor, describe_mask, sidecar_path
from pipelines.inputs.request_files import find_masks, mask_requests
from pipelines.planning import volume_seed
from pipelines.storage.finished import write_manifest
from volumes import volume_stem

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"a": (8, 8, 8), "b": (7, 8, 5), "c": (12, 8, 8)}
NAMES = [f"{stem}_{k:03d}" for stem in SHAPES for k in range(2)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pipeline folder with example masks, as weights/hippocampus."""
    folder = tmp_path_factory.mktemp("inputs") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    (folder / "masks").mkdir()
    for seed, (stem, shape) in enumerate(SHAPES.items()):
        nib.save(mask_image(shape, np.diag([-1.0, 1, 1, 1]), seed), folder / "masks" / f"{stem}.nii.gz")
    return folder


def arguments(inputs, output, *more):
    masks = str(inputs / "masks" / "*.nii.gz")
    settings = ["--count", "2", "--steps", "2", "--seed", "7", "--pipeline", str(inputs)]
    return [*settings, "--masks", masks, "--output", str(output), *more]


@pytest.fixture(scope="module")
def generated(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("generated")
    generate.main(arguments(inputs, output))
    return output


def test_volumes_sidecars_and_manifest(inputs, generated):
    assert sorted(path.name for path in generated.glob("[!.]*")) == sorted(
        ["manifest.csv", "preview.png", *(f"{name}{suffix}" for name in NAMES for suffix in (".json", ".nii.gz"))]
    )
    for name in NAMES:
        mask, volume = nib.load(inputs / "masks" / f"{name[0]}.nii.gz"), nib.load(generated / f"{name}.nii.gz")
        assert volume.shape == mask.shape
        np.testing.assert_allclose(volume.affine, mask.affine)
    with open(generated / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{name}.nii.gz" for name in NAMES]
    assert len({row["seed"] for row in rows}) == len(NAMES)
    record = json.loads((generated / "b_001.json").read_text())
    assert record["mask"] == describe_mask(inputs / "masks" / "b.nii.gz")
    assert rows[3]["mask"] == "b.nii.gz" and rows[3]["seed"] == str(record["seed"])
    assert rows[3]["model"] == record["model"] == MedVolumePipeline.from_pretrained(inputs).model_hash


def test_seeds_are_stable():
    """Written down once: a change would silently change every volume that was ever announced by its seed."""
    assert volume_seed(0, "hippocampus_001", 0) == 7695260888439008048
    assert len({volume_seed(s, stem, k) for s in (0, 1) for stem in ("a", "b") for k in (0, 1)}) == 8


def test_a_sidecar_reproduces_its_volume(inputs, generated):
    record = json.loads((generated / "c_001.json").read_text())
    pipe = MedVolumePipeline.from_pretrained(inputs)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(record["seed"])
    steps = record["num_inference_steps"]
    again = pipe(inputs / "masks" / "c.nii.gz", num_inference_steps=steps, generator=[generator]).volumes[0]
    np.testing.assert_allclose(np.asarray(again.dataobj), voxels(generated)["c_001.nii.gz"], atol=0.01)


def test_batch_size_changes_nothing(inputs, generated, tmp_path):
    generate.main(arguments(inputs, tmp_path, "--batch_size", "1"))
    assert_same(tmp_path, generated)


def test_an_interrupted_run_goes_on(inputs, generated, tmp_path, monkeypatch):
    """Stopped after two volumes, the second's file lost: the next run makes the rest, and touches what is finished no
    more."""
    write, written = VolumeProcessor.write, []

    def stop(self, slabs, prepared, paths, description):
        if len(written) == 2:
            paths[0].write_bytes(b"half a volume")
            raise KeyboardInterrupt
        written.append(tmp_path / paths[0].name)
        write(self, slabs, prepared, paths, description)

    monkeypatch.setattr(VolumeProcessor, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        generate.main(arguments(inputs, tmp_path))
    assert set(tmp_path.glob("[!.]*")) == {*written, *map(sidecar_path, written)}
    written[1].unlink()
    finished = written[0].stat().st_mtime_ns
    monkeypatch.setattr(VolumeProcessor, "write", write)
    generate.main(arguments(inputs, tmp_path))
    assert written[0].stat().st_mtime_ns == finished
    assert_same(tmp_path, generated)
    assert (tmp_path / "manifest.csv").read_text() == (generated / "manifest.csv").read_text()


def test_other_settings_are_refused(inputs, generated, tmp_path):
    with pytest.raises(ValueError, match="a_000.nii.gz: was generated with another num_inference_steps") as error:
        generate.main(arguments(inputs, generated, "--steps", "3"))
    assert "choose another --output" in str(error.value)
    nib.save(mask_image((8, 8, 8)), tmp_path / "a_000.nii.gz")
    with pytest.raises(ValueError, match="a_000.nii.gz: has no sidecar"):
        generate.main(arguments(inputs, tmp_path))


def test_an_unwritable_output_is_refused_before_any_work(inputs, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(MedVolumePipeline, "generate", None)
    with pytest.raises(ValueError, match=r"--output .*file: cannot be written to: File exists"):
        generate.main(arguments(inputs, tmp_path / "file"))


def test_the_manifest_lists_our_volumes_alone(generated, tmp_path):
    for path in generated.glob("a_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    nib.save(mask_image((8, 8, 8)), tmp_path / "theirs.nii.gz")
    (tmp_path / "theirs.json").write_text('{"Modality": "MR"}')
    assert write_manifest(tmp_path) == 2
    (tmp_path / "a_000.nii.gz").unlink()  # its sidecar alone makes no volume
    assert write_manifest(tmp_path) == 1
    assert [row["file"] for row in csv.DictReader((tmp_path / "manifest.csv").open())] == ["a_001.nii.gz"]


def test_masks_are_found_or_named(inputs, tmp_path):
    masks = inputs / "masks"
    found = find_masks([str(masks)], tmp_path)
    assert [volume_stem(path) for path in found] == ["a", "b", "c"]
    assert find_masks([str(masks / "*.nii.gz"), str(masks / "a.nii.gz")], tmp_path) == found
    with pytest.raises(ValueError, match="no masks found in .*nowhere"):
        find_masks([str(tmp_path / "nowhere")], tmp_path)
    with pytest.raises(ValueError, match="write volumes to another folder"):
        find_masks([str(masks)], masks)
    nib.save(mask_image((8, 8, 8)), tmp_path / "a.nii")
    for half in ("hdr", "img"):
        (tmp_path / f"pair.{half}.gz").touch()
    assert volume_stem(*(p for p in find_masks([str(tmp_path)], masks) if "pair" in p.name)) == "pair"
    nib.save(mask_image((8, 8, 8)), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="a.nii and .*a.nii.gz have the same stem, so their volumes would too"):
        mask_requests([str(tmp_path)], tmp_path / "out")


def test_every_bad_mask_is_named_before_anything_is_made(inputs, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for stem, label in {"good": 2, "bad": 7, "worse": 8}.items():
        array = np.zeros((8, 8, 8), dtype=np.int16)
        array[2:4] = label
        nib.save(nib.Nifti1Image(array, np.eye(4)), masks / f"{stem}.nii.gz")
    base = ["--pipeline", str(inputs), "--masks", str(masks), "--output", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(ValueError, match=r"(?s)bad.nii.gz.*\[7\].*worse.nii.gz.*\[8\]"):
        generate.main(base)
    assert not (tmp_path / "out").exists()
    generate.main([*base, "--label_map", "7=2", "8=posterior"])
    assert json.loads((tmp_path / "out" / "worse_000.json").read_text())["label_map"] == {"7": 2, "8": "posterior"}


def test_two_processes_make_what_one_makes(inputs, generated, tmp_path):
    two = forked.start_two("generate", arguments(inputs, tmp_path / "out"), tmp_path / "log.txt")
    codes = [forked.ended(process) for process in two]
    logs = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], logs
    assert sum(log.count("6 volumes in") for log in logs) == 1
    assert_same(tmp_path / "out", generated)
    assert (tmp_path / "out" / "manifest.csv").read_text() == (generated / "manifest.csv").read_text()


def test_demo(inputs, tmp_path, capsys):
    (inputs / "examples.csv").write_text("mask\nmasks/a.nii.gz\nmasks/b.nii.gz\n")
    demo.main(["--weights", str(inputs.parent), "--output", str(tmp_path / "demo"), "--steps", "1"])
    folder = tmp_path / "demo" / inputs.name
    (folder / "notes.txt").write_text("mine")
    (folder / "a_000.nii.gz").unlink()
    there = (folder / "b_000.nii.gz").stat().st_mtime_ns
    demo.run_demo(inputs.parent, tmp_path / "demo", num_inference_steps=1)  # makes what is missing, and removes nothing
    assert (folder / "b_000.nii.gz").stat().st_mtime_ns == there
    (folder / "notes.txt").unlink()
    expected = [f"{stem}_000{suffix}" for stem in "ab" for suffix in (".json", ".nii.gz")]
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted(["manifest.csv", "preview.png", *expected])
    assert nib.load(folder / "b_000.nii.gz").shape == SHAPES["b"]
    assert str(folder / "preview.png") in capsys.readouterr().out
    with pytest.raises(ValueError, match="no pipeline with an examples.csv"):
        demo.run_demo(tmp_path, tmp_path / "demo")


def test_masks_of_other_formats_are_found(inputs, tmp_path):
    import SimpleITK

    image = SimpleITK.ReadImage(str(inputs / "masks" / "a.nii.gz"))
    for suffix in (".nrrd", ".mha"):
        SimpleITK.WriteImage(image, str(tmp_path / f"other{suffix[1:]}{suffix}"))
    found = find_masks([str(tmp_path)], inputs)
    assert [volume_stem(path) for path in found] == ["othermha", "othernrrd"]
    folder = tmp_path / "out"
    generate.main(arguments(inputs, folder, "--masks", *(str(path) for path in found)))
    first, second = (nib.load(folder / f"{stem}_000.nii.gz") for stem in ("othermha", "othernrrd"))
    original = nib.load(inputs / "masks" / "a.nii.gz")
    assert first.shape == second.shape == original.shape
    np.testing.assert_allclose(first.affine, original.affine, atol=1e-4)
