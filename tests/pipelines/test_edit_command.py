"""edit.py: edits with the guarantees of generate.py, and lesions from the command line."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from compared import assert_same, voxels
from tiny import editor_of, mask_image, tiny_pipeline

import edit
from benchmarks import forked
from pipelines import MedVolumeEditPipeline, MedVolumePipeline, VolumeProcessor, describe_mask
from pipelines.inputs.edit_files import Lesion, keep_or_write, label_value, named_images
from pipelines.planning import volume_seed
from volumes import read_mask, read_volume
from volumes.lesions import ellipsoid, insert_lesion, remove_lesion

SCALE = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [0.5, 99.5]}
AFFINE = np.diag([-1.0, 1, 1, 1])


def save_image(path, shape, seed):
    values = np.random.default_rng(seed).uniform(100, 300, shape).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline; two images with masks and regions, in folders of patients; and a table of both."""
    folder = tmp_path_factory.mktemp("edit")
    tiny_pipeline(intensity=[SCALE]).save_pretrained(folder / "pipeline")
    for number, shape in enumerate([(8, 8, 8), (12, 8, 8)]):
        home = folder / f"p{number}"
        save_image(home / "scan.nii.gz", shape, number)
        nib.save(mask_image(shape, AFFINE, number), home / "labels.nii.gz")
        region = np.zeros(shape, np.uint8)
        region[2:5, 2:6, 1:5] = 1
        nib.save(nib.Nifti1Image(region, AFFINE), home / "part.nii.gz")
    rows = ["image,mask,region,strength,scanner"]
    rows += [
        f"p{number}/scan.nii.gz,p{number}/labels.nii.gz,{part},A"
        for number, part in enumerate(["p0/part.nii.gz,", ",0.5"])
    ]
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


def run(place, output, *words):
    edit.main(["--pipeline", str(place / "pipeline"), "--output", str(output), "--steps", "4", *map(str, words)])


@pytest.fixture(scope="module")
def edited(place):
    """The edits of the table, two of each."""
    run(place, place / "edited", "--edits", place / "table.csv", "--count", "2", "--blend_margin", "2", "--seed", "3")
    return place / "edited"


def test_a_table_of_edits(place, edited):
    """Named by what differs in the paths; outside the region every voxel is the image's; each is its call's."""
    names = [f"p{number}_{k:03d}" for number in range(2) for k in range(2)]
    with open(edited / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{name}.nii.gz" for name in names]
    assert [row["strength"] for row in rows] == ["1.0", "1.0", "0.5", "0.5"]
    assert [row["region"] for row in rows] == ["part.nii.gz", "part.nii.gz", "", ""]
    assert {row["edited_image"] for row in rows} == {"scan.nii.gz"} and (edited / "preview.png").is_file()
    before, region = (nib.load(place / f"p0/{name}.nii.gz") for name in ("scan", "part"))
    inside = np.asarray(region.dataobj) != 0
    for k in range(2):
        after = np.asarray(nib.load(edited / f"p0_{k:03d}.nii.gz").dataobj)
        same = after == np.asarray(before.dataobj)
        assert same[~inside].all() and not same[inside].all()
    record = json.loads((edited / "p0_001.json").read_text())
    assert record["seed"] == volume_seed(3, "p0", 1) and record["edit"]["blend_margin"] == 2
    assert record["edit"]["region"] == describe_mask(place / "p0/part.nii.gz")
    pipe = editor_of(MedVolumePipeline.from_pretrained(place / "pipeline"))
    home = place / "p1"
    again = pipe(
        home / "labels.nii.gz",
        home / "scan.nii.gz",
        strength=0.5,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(volume_seed(3, "p1", 0)),
    ).volumes[0]
    np.testing.assert_allclose(np.asarray(again.dataobj), voxels(edited)["p1_000.nii.gz"], atol=0.01)


def test_batches_and_interruptions_change_nothing(place, edited, tmp_path, monkeypatch):
    words = ["--edits", place / "table.csv", "--count", "2", "--blend_margin", "2", "--seed", "3"]
    write, written = VolumeProcessor.write, []

    def stop(self, slabs, prepared, paths, description):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(paths[0].name)
        write(self, slabs, prepared, paths, description)

    monkeypatch.setattr(VolumeProcessor, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path, *words, "--batch_size", "1")
    there = (tmp_path / written[0]).stat().st_mtime_ns
    monkeypatch.setattr(VolumeProcessor, "write", write)
    run(place, tmp_path, *words, "--batch_size", "1")
    assert (tmp_path / written[0]).stat().st_mtime_ns == there
    assert_same(tmp_path, edited)
    with pytest.raises(ValueError, match=r"p0_000.nii.gz: was generated with another edit"):
        run(place, tmp_path, *words[:-4], "--blend_margin", "3", "--seed", "3")


def test_two_processes_edit_what_one_edits(place, edited, tmp_path):
    words = [
        "--pipeline",
        place / "pipeline",
        "--output",
        tmp_path / "out",
        "--steps",
        "4",
        "--edits",
        place / "table.csv",
    ]
    words += ["--count", "2", "--blend_margin", "2", "--seed", "3"]
    two = forked.start_two("edit", [str(word) for word in words], tmp_path / "log.txt")
    codes = [forked.ended(process) for process in two]
    assert codes == [0, 0], [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert_same(tmp_path / "out", edited)


def test_a_lesion_is_inserted_and_removed(place, tmp_path):
    """The new mask and the region are those of `volumes.lesions`, beside the result."""
    home = place / "p1"
    words = ["--image", home / "scan.nii.gz", "--mask", home / "labels.nii.gz", "--name", "case"]
    run(place, tmp_path / "in", *words, "--insert", "posterior@5,4,3", "--diameter", "4", "--within", "0", "anterior")
    mask = read_mask(home / "labels.nii.gz")
    expected, region = insert_lesion(mask, ellipsoid(4, mask.spacing), (5, 4, 3), 5, within=[0, 2])
    folder = tmp_path / "in"
    np.testing.assert_array_equal(read_mask(folder / "masks/case.nii.gz").array, expected.array)
    np.testing.assert_array_equal(read_mask(folder / "regions/case.nii.gz").array, region.array)
    record = json.loads((folder / "case_000.json").read_text())
    assert record["mask"] == describe_mask(folder / "masks/case.nii.gz")
    assert record["edit"]["region"] == describe_mask(folder / "regions/case.nii.gz")
    same = read_volume(folder / "case_000.nii.gz").array == read_volume(home / "scan.nii.gz").array
    assert same[region.array == 0].all() and not same[region.array != 0].all()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
    run(place, folder, *words, "--insert", "posterior@5,4,3", "--diameter", "4", "--within", "0", "anterior")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")} == times
    with pytest.raises(ValueError, match="masks/case.nii.gz: is another mask or region; choose another --output"):
        run(place, folder, *words, "--insert", "posterior@5,4,4", "--diameter", "4")
    run(place, tmp_path / "out", *words, "--remove", "5", "--replacement", "background")
    without = remove_lesion(mask, 5, 0)[0]
    np.testing.assert_array_equal(read_mask(tmp_path / "out/masks/case.nii.gz").array, without.array)


def test_a_lesion_in_a_mask_of_other_values(place, tmp_path):
    """--label_map is applied before; the new mask holds the model's values."""
    home = place / "p0"
    values = np.asarray(nib.load(home / "labels.nii.gz").dataobj)
    nib.save(nib.Nifti1Image(np.where(values == 2, 9, values).astype(np.int16), AFFINE), tmp_path / "theirs.nii.gz")
    words = ["--image", home / "scan.nii.gz", "--mask", tmp_path / "theirs.nii.gz", "--label_map", "9=2"]
    run(place, tmp_path / "out", *words, "--remove", "posterior", "--replacement", "0")
    edited = read_mask(tmp_path / "out/masks/scan.nii.gz").array
    np.testing.assert_array_equal(edited, remove_lesion(read_mask(home / "labels.nii.gz"), 5, 0)[0].array)


def test_a_lesion_in_a_mask_of_swapped_values(place, tmp_path):
    """A label map is not applied a second time, to the new mask."""
    home = place / "p0"
    words = ["--image", home / "scan.nii.gz", "--mask", home / "labels.nii.gz", "--label_map", "2=5", "5=2"]
    run(place, tmp_path / "out", *words, "--insert", "2@4,4,4", "--diameter", "3")
    record = json.loads((tmp_path / "out/scan_000.json").read_text())
    assert record["label_map"] is None
    swapped = np.array([0, 0, 5, 0, 0, 2])[read_mask(home / "labels.nii.gz").array]
    edited, region = (read_mask(tmp_path / f"out/{name}/scan.nii.gz").array for name in ("masks", "regions"))
    assert (edited == swapped)[region == 0].all() and edited[0, 4, 4, 4] == 2


def test_edits_of_several_kinds_share_no_batch(place, tmp_path):
    """Equal grids, other strengths, with a region and without: one command, a batch for each kind."""
    names = ["strength", "0.5", "1", "0.5"]
    rows = ["image,mask,region,strength,name"]
    rows += [f"p0/scan.nii.gz,p0/labels.nii.gz,{'' if n == 1 else 'p0/part.nii.gz'},{names[n]},e{n}" for n in (1, 2, 3)]
    table = place / "kinds.csv"
    table.write_text("\n".join(rows) + "\n")
    run(place, tmp_path / "together", "--edits", table)
    run(place, tmp_path / "apart", "--edits", table, "--batch_size", "1")
    assert_same(tmp_path / "together", tmp_path / "apart")


def test_several_channels_and_a_kept_one(tmp_path):
    scales = [SCALE, {**SCALE, "low": 0.0, "high": 20.0}]
    tiny_pipeline(channels=["ct", "pet"], intensity=scales, images={"ct": 4}).save_pretrained(tmp_path / "pipeline")
    for seed, channel in enumerate(("ct", "pet")):
        save_image(tmp_path / f"p/{channel}.nii.gz", (8, 8, 8), seed)
    nib.save(mask_image((8, 8, 8), AFFINE), tmp_path / "m.nii.gz")
    both = ["--image", f"ct={tmp_path / 'p/ct.nii.gz'}", f"pet={tmp_path / 'p/pet.nii.gz'}"]
    words = [*both, "--mask", tmp_path / "m.nii.gz", "--keep_channels", "ct", "--strength", "0.5", "--name", "p"]
    run(tmp_path, tmp_path / "out", *words)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["p_000_pet.nii.gz"]
    record = json.loads((tmp_path / "out/p_000.json").read_text())
    assert list(record["images"]) == ["ct"] and list(record["edit"]["image"]) == ["pet"]
    with pytest.raises(ValueError, match="--image: pet is missing; give it as pet=FILE"):
        run(tmp_path, tmp_path / "other", both[0], both[1], "--strength", "1")


@pytest.mark.parametrize(("words", "message"), [
    ([], "one of the arguments --image --edits is required"),
    (["--edits", "t.csv", "--mask", "m.nii"], "--mask: is a column of the table of --edits"),
    (["--image", "a.nii", "--insert", "1@2,3,4", "--diameter", "3"], "change a mask; give --mask FILE"),
    (["--image", "a.nii", "--mask", "m.nii", "--insert", "1", "--diameter", "3"], "needs a place, and --diameter MM"),
    (["--image", "a.nii", "--mask", "m.nii", "--insert", "1@2,3,4"], "needs a place, and --diameter MM"),
    (["--image", "a.nii", "--mask", "m.nii", "--insert", "1@2,3"], "is not LABEL@X,Y,Z, such as"),
    (["--image", "a.nii", "--mask", "m.nii", "--remove", "1"], "needs the label in its place"),
    (["--image", "a.nii", "--mask", "m.nii", "--diameter", "3"], "are for --insert"),
    (["--image", "a.nii", "--replacement", "3"], "is for --remove LABEL"),
    (["--image", "a.nii", "--mask", "m", "--region", "r", "--remove", "1", "--replacement", "0"], "leave it out"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        edit.parse(["--pipeline", "p", "--output", "o", *words])
    assert message in " ".join(capsys.readouterr().err.split())


def test_edits_that_cannot_be_are_refused_before_any_work(place, tmp_path, monkeypatch):
    monkeypatch.setattr(MedVolumeEditPipeline, "generate", None)
    image = ["--image", place / "p0/scan.nii.gz", "--mask", place / "p0/labels.nii.gz"]
    part = ["--region", place / "p0/part.nii.gz"]
    tables = iter(tmp_path / f"table{number}.csv" for number in range(9))

    def rows(*lines):
        table = next(tables)
        table.write_text("\n".join(line.replace("P/", f"{place}/") for line in lines) + "\n")
        return ["--edits", table]

    cases = [
        (image, r"scan: give --strength \(image to image\), --region \(inpainting\), or both"),
        ([*image, "--strength", "2"], r"scan: .*strength"),
        (["--image", "none.nii.gz", *part], "none.nii.gz: no such file"),
        (["--image", "a.nii", "b.nii", *part], "give one file per channel of the model: --image MR=FILE"),
        ([*image, "--insert", "lung@1,1,1", "--diameter", "3"], "'lung' is not a label of this model; it knows"),
        ([*image, "--insert", "2@99,1,1", "--diameter", "3"], "changes no voxel"),
        (rows("image,mask", "P/p0/scan.nii.gz,"), "give --strength"),
        (rows("mask,strength", "P/p0/labels.nii.gz,1"), "line 2: has no image; an edit needs the image"),
        (rows("image,strength", "P/p0/scan.nii.gz,much"), "line 2: strength is 'much', expected a number"),
        (rows("imgae,strength", "P/p0/scan.nii.gz,1"), "unknown columns 'imgae' \\(did you mean image"),
        (rows("image,strength,name", "P/p0/scan.nii.gz,1,x", "P/p1/scan.nii.gz,1,X"), "would both be called X"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            run(place, tmp_path / "out", *words)
    with pytest.raises(ValueError, match="lies in --output"):
        run(place, place / "p0", *image, *part)
    assert not list((tmp_path).glob("out/*.nii.gz"))


def test_words_of_image_and_labels(place, tmp_path):
    image = place / "p0/scan.nii.gz"
    assert named_images([str(image)], ["MR"]) == named_images([f"MR={image}"], ["MR"]) == {"MR": image}
    odd = tmp_path / "a=b.nii.gz"
    odd.write_bytes(image.read_bytes())
    assert named_images([str(odd)], ["MR"]) == {"MR": odd}
    assert label_value("anterior", {0: "b", 2: "anterior"}) == label_value("2", {0: "b", 2: "anterior"}) == 2
    assert Lesion("2").replacement is None
    mask = read_mask(place / "p0/labels.nii.gz")
    (tmp_path / "half.nii.gz").write_bytes(b"half")
    with pytest.raises(ValueError, match="half.nii.gz: is another mask or region"):
        keep_or_write(mask, tmp_path / "half.nii.gz")
