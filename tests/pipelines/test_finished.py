"""Which generated volumes count as finished, who may write to an output, and what is never replaced or written
through."""

import csv
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from tiny import mask_image, tiny_pipeline

import generate
from cli.stopping import Stopped
from files import locks
from files.atomic import UNFINISHED
from files.locks import OutputInUse, only_writer
from pipelines import MedVolumePipeline, Rejection, batch_generation, planning, write_synthetic
from pipelines.rejection import Check
from pipelines.restore import Restorer
from pipelines.storage.finished import finished_volumes, write_manifest
from pipelines.storage.provenance import read_sidecar, sidecar_content
from volumes import VoxelError

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX links and pipes")
NAMES = ("a_000", "b_000")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pipeline folder with two masks."""
    folder = tmp_path_factory.mktemp("inputs") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    (folder / "masks").mkdir()
    for seed, stem in enumerate("ab"):
        nib.save(mask_image((8, 8, 5 + 7 * seed), seed=seed), folder / "masks" / f"{stem}.nii.gz")
    return folder


def run(inputs, output, *more):
    masks = ["--masks", str(inputs / "masks")] if "--masks" not in more and "--conditions" not in more else []
    generate.main(["--pipeline", str(inputs), "--output", str(output), "--steps", "1", *masks, *more])


@pytest.fixture
def output(inputs, made, tmp_path):
    """A copy of a finished output."""
    folder = tmp_path / "out"
    folder.mkdir()
    for path in made.glob("[!.]*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run(inputs, folder)
    return folder


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(MedVolumePipeline, "generate", lambda *_, **__: pytest.fail("a volume was generated"))


def listed(folder):
    with open(folder / "manifest.csv", newline="") as file:
        return [row["file"] for row in csv.DictReader(file)]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_sidecar_records_the_bytes_of_its_files(made):
    for name in NAMES:
        data = (made / f"{name}.nii.gz").read_bytes()
        entry = {"file": f"{name}.nii.gz", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content, record = (read(made / f"{name}.nii.gz") for read in (sidecar_content, read_sidecar))
        assert content is not None and content == {**(record or {}), "files": [entry]} and "files" not in (record or {})


DAMAGES = {
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes, its sidecar says"),
    "flipped": (flip, "is damaged"),
    "gone": (Path.unlink, "is missing"),
    "sidecar gone": (lambda path: path.with_name("a_000.json").unlink(), "has no sidecar"),
    "all empty": (lambda path: (path.with_name("a_000.json").unlink(), path.write_bytes(b"")), "has no sidecar"),
    "no digests": (lambda path: change(path.with_name("a_000.json"), files=7), "does not record the digests"),
    "other digest": (
        lambda path: change(
            path.with_name("a_000.json"), files=[{"bytes": path.stat().st_size, "sha256": "0" * 64}]
        ),
        "is damaged",
    ),
    "another's bytes": (lambda path: path.write_bytes(path.with_name("b_000.nii.gz").read_bytes()), "a_000"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_finished_is_generated_again_and_said(inputs, made, output, capsys, damage):
    spoil, reason = DAMAGES[damage]
    spoil(output / "a_000.nii.gz")
    kept = (output / "b_000.nii.gz").stat().st_mtime_ns
    run(inputs, output)
    said = [line for line in capsys.readouterr().out.splitlines() if "generated again" in line]
    assert len(said) == 1 and "a_000.nii.gz" in said[0] and reason in said[0]
    for path in (*made.glob("*.nii.gz"), *made.glob("*.json"), made / "manifest.csv"):
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert (output / "b_000.nii.gz").stat().st_mtime_ns == kept


def test_nothing_is_generated_where_all_is_finished(inputs, output, capsys, no_work):
    run(inputs, output)
    assert "generated again" not in capsys.readouterr().out


def drop(path: Path, name: str) -> None:
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))


FOREIGN = {
    "damaged": lambda path: path.write_text(path.read_text()[:-20]),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "list": lambda path: path.write_text("[1]"),
    "other": lambda path: path.write_text('{"Modality": "MR"}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "huge": lambda path: os.truncate(path, 1 << 33),
    "channels": lambda path: change(path, channels=["../../a"]),
    "channels of no kind": lambda path: change(path, channels=7),
    "rejected": lambda path: change(path, rejected=7),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "seed": lambda path: change(path, seed=5),
    **{f"without {name}": partial(drop, name=name) for name in ("mask", "images", "seed")},
    "model": lambda path: change(path, model="0" * 64),
}


@posix
@pytest.mark.parametrize("kind", FOREIGN)
def test_damaged_or_foreign_sidecars_are_refused_first(inputs, output, no_work, kind):
    """Before any work."""
    FOREIGN[kind](output / "a_000.json")
    (output / "b_000.nii.gz").unlink()
    with pytest.raises(ValueError, match="choose another --output, or remove these first:\n.*a_000"):
        run(inputs, output)


@posix
@pytest.mark.parametrize("kind", [*FOREIGN, "odd"])
def test_sidecars_of_volumes_not_requested_do_not_end_the_run(inputs, made, output, caplog, kind):
    """Even where they are damaged or foreign."""
    if kind == "odd":
        change(output / "a_000.json", mask=3, scheduler=None, classes=[])
    else:
        FOREIGN[kind](output / "a_000.json")
    (output / "b_000.nii.gz").unlink()
    run(inputs, output, "--masks", str(inputs / "masks" / "b.nii.gz"))
    expected = ["b_000.nii.gz"] if kind not in ("seed", "model") else ["a_000.nii.gz", "b_000.nii.gz"]
    assert listed(output) == expected
    assert ("a_000.nii.gz: skipped" in caplog.text) == (len(expected) == 1)
    assert (output / "b_000.nii.gz").read_bytes() == (made / "b_000.nii.gz").read_bytes()


@pytest.mark.parametrize("damage", ["emptied", "truncated", "flipped", "gone", "other digest"])
def test_the_manifest_lists_finished_volumes_alone(output, damage):
    DAMAGES[damage][0](output / "a_000.nii.gz")
    assert write_manifest(output) == 1 and listed(output) == ["b_000.nii.gz"]
    assert [path.name for path, _ in finished_volumes(output)] == ["b_000.nii.gz"]


def test_a_volume_of_somebody_else_is_not_replaced(inputs, output, no_work):
    (output / "a_000.json").unlink()
    nib.save(mask_image((8, 8, 5)), output / "a_000.nii.gz")
    with pytest.raises(ValueError, match="a_000.nii.gz: has no sidecar, so it was not generated by this script"):
        run(inputs, output)
    (output / "a_000.nii.gz").write_bytes(b"no NIfTI")
    with pytest.raises(ValueError, match="a_000.nii.gz: has no sidecar, so it was not generated by this script"):
        run(inputs, output)
    (output / "a_000.nii.gz").unlink()
    (output / "a_000.nii.gz").mkdir()
    with pytest.raises(ValueError, match="a_000.nii.gz: is not a regular file"):
        run(inputs, output)


def test_files_of_other_channels_are_not_replaced_silently(inputs, output, no_work):
    """The sidecar is of a volume of two channels, whose files have other names."""
    change(output / "a_000.json", channels=["ct"])
    (output / "a_000.nii.gz").rename(output / "a_000_ct.nii.gz")
    with pytest.raises(ValueError, match="a_000.nii.gz: was generated with another channels"):
        run(inputs, output)


@pytest.mark.parametrize("content", ["name,age\n", "\xff", "file;mask;"])
def test_a_manifest_of_somebody_else_is_not_replaced(inputs, tmp_path, no_work, content):
    (tmp_path / "manifest.csv").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.csv: is not a manifest of generate.py"):
        run(inputs, tmp_path)
    (tmp_path / "manifest.csv").unlink()
    (tmp_path / "manifest.csv").mkdir()
    with pytest.raises(ValueError, match=r"manifest.csv: is a folder, not a regular file"):
        run(inputs, tmp_path)


@posix
def test_planted_links_are_replaced_or_refused(inputs, made, tmp_path, monkeypatch):
    """The output folder itself may be a link."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "disk").mkdir()
    output = tmp_path / "out"
    output.symlink_to("disk")
    for name in ("manifest.csv", ".manifest.csv", "b_000.nii.gz", ".medvolume.lock.json"):
        (output / name).symlink_to(tmp_path / "later" if name[0] in "mb" else precious)
    run(inputs, output)
    assert precious.read_text() == "precious" and not (tmp_path / "later").exists()
    assert listed(output) == [f"{name}.nii.gz" for name in NAMES]
    assert (output / "b_000.nii.gz").read_bytes() == (made / "b_000.nii.gz").read_bytes()
    assert not (output / "b_000.nii.gz").is_symlink() and not (output / "manifest.csv").is_symlink()

    subjects = property(lambda _: [{"salt": "00", "subjects": []}])
    monkeypatch.setattr(MedVolumePipeline, "training_subjects", subjects)
    (output / "provenance").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="provenance: a link is in the place of this folder"):
        run(inputs, output)
    (output / "provenance").unlink()
    (output / "provenance").mkdir()
    (output / "provenance/training_subjects.json").symlink_to(tmp_path / "later")
    run(inputs, output)
    assert not (tmp_path / "later").exists() and (output / "provenance/training_subjects.json").is_file()


@posix
def test_a_link_in_the_place_of_the_generated_masks_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/masks").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(batch_generation, "check_same_labels", lambda _: None)
    with pytest.raises(FileExistsError, match="masks: a link is in the place of this folder"):
        generate.main(["--pipeline", "p", "--masks", "generate:m", "--output", str(tmp_path / "out")])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_writers_leave_a_whole_manifest(output):
    record = json.loads((output / "a_000.json").read_text())
    data = (output / "a_000.nii.gz").read_bytes()
    for number in range(40):
        (output / f"v{number:03d}_000.json").write_text(json.dumps(record))
        (output / f"v{number:03d}_000.nii.gz").write_bytes(data)
    counts: list[int] = []

    def write():
        for _ in range(5):
            write_manifest(output)
            counts.append(len(listed(output)))

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert counts == [42] * 15
    assert not list(output.glob(f"{UNFINISHED}*"))


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from files.locks import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(output):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output), str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def state_of(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def test_a_second_job_is_refused_and_touches_nothing(inputs, output, holder, no_work):
    (output / "a_000.nii.gz").write_bytes(b"")
    before = state_of(output)
    with pytest.raises(
        OutputInUse, match=rf"--output .*another process writes there: process {holder.pid} on .*--wait_minutes"
    ):
        run(inputs, output)
    assert state_of(output) == before


def test_a_second_job_waits_when_it_is_asked_to(inputs, made, output, holder, capsys, monkeypatch):
    (output / "a_000.nii.gz").write_bytes(b"")
    # the lock ends with its process
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: (holder.kill(), holder.wait()))
    monkeypatch.setattr(locks, "time", clock)
    run(inputs, output, "--wait_minutes", "1")
    assert f"waiting for another process that writes to {output}: process {holder.pid}" in capsys.readouterr().out
    assert (output / "a_000.nii.gz").read_bytes() == (made / "a_000.nii.gz").read_bytes()


def test_generated_masks_and_their_volumes_are_one_job(tmp_path, monkeypatch):
    """OUTPUT is held while OUTPUT/masks is written, and both once."""
    held: list[list[str]] = []

    def one(options, state, *, held_already=None, held=None):
        folders = [tmp_path / "out", tmp_path / "out/masks"]
        there = []
        for folder in folders:
            if folder.is_dir():
                try:
                    with only_writer(folder):
                        pass
                except OutputInUse:
                    there.append(folder.name)
        calls.append((options.output.name, there, held))
        options.output.mkdir(exist_ok=True)
        (options.output / "map_000.nii.gz").touch()
        return []

    calls: list[tuple] = []
    monkeypatch.setattr(batch_generation, "check_same_labels", lambda _: None)
    monkeypatch.setattr(batch_generation, "generate_to_disk", one)
    generate.main(["--pipeline", "p", "--masks", "generate:m", "--output", str(tmp_path / "out")])
    assert calls == [("masks", ["out"], None), ("out", ["out"], True)] and not held


def test_what_a_killed_run_left_is_removed(inputs, output):
    left = output / f"{UNFINISHED}1"
    (left / "new").mkdir(parents=True)
    (left / "new/half.nii.gz").write_bytes(b"half")
    os.utime(left, (0, 0))
    run(inputs, output)
    assert not left.exists()


@pytest.fixture
def spoiled(monkeypatch):
    """Of volumes of 5 planes (a), one voxel is not finite in the units of the file."""
    original = Restorer.to_original_units

    def spoil(self, array):
        array = original(self, array)
        if array.shape[3] == 5:
            array[0, 1, 2, 3] = np.inf
        return array

    monkeypatch.setattr(Restorer, "to_original_units", spoil)


@pytest.mark.parametrize("batch", ["1", "8"])
def test_one_volume_that_is_not_finite_does_not_stop_others(inputs, made, tmp_path, spoiled, batch):
    """It is refused by name, and all others are written."""
    with pytest.raises(
        ValueError, match=r"(?s)all others are finished.*a_000.nii.gz: the volume of seed \d+: voxels are not finite"
    ):
        run(inputs, tmp_path, "--batch_size", batch)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "b_000.json",
        "b_000.nii.gz",
        "manifest.csv",
        "preview.png",
    ]
    assert listed(tmp_path) == ["b_000.nii.gz"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_damaged_volume_that_is_not_made_again_is_not_listed(inputs, output, spoiled, monkeypatch, interrupted):
    flip(output / "a_000.nii.gz")
    if interrupted:
        monkeypatch.setattr(MedVolumePipeline, "generate", lambda *_, **options: (_ for _ in ()).throw(Stopped(130)))
    with pytest.raises(Stopped if interrupted else ValueError):
        run(inputs, output)
    assert listed(output) == ["b_000.nii.gz"]


@pytest.mark.parametrize("change", ["other", "unusable", "gone"])
def test_masks_that_change_during_a_run_end_it_with_a_manifest(inputs, tmp_path, monkeypatch, capsys, change):
    """Masks that are too much to hold are read again for their batch; what was finished before is listed."""
    masks, work = tmp_path / "masks", MedVolumePipeline.generate
    masks.mkdir()
    for stem in "ab":
        (masks / f"{stem}.nii.gz").write_bytes((inputs / "masks" / f"{stem}.nii.gz").read_bytes())

    def changing(*given, **options):
        if change == "gone":
            (masks / "b.nii.gz").unlink()
        else:
            nib.save(mask_image((8, 8, 12), seed=9) if change == "other" else mask_image((8, 8)), masks / "b.nii.gz")
        return work(*given, **options)

    monkeypatch.setattr(planning, "HELD_BYTES", 0)
    monkeypatch.setattr(MedVolumePipeline, "generate", changing)
    with pytest.raises((ValueError, OSError), match=r"b(_000)?\.nii\.gz"):
        run(inputs, tmp_path / "out", "--masks", str(masks))
    assert listed(tmp_path / "out") == ["a_000.nii.gz"]
    assert f"stopped: 1 volumes are in {tmp_path / 'out'}" in capsys.readouterr().out


def test_a_manifest_that_fails_does_not_hide_the_error(inputs, output, monkeypatch):
    flip(output / "a_000.nii.gz")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(MedVolumePipeline, "generate", lambda *_, **__: (_ for _ in ()).throw(full))
    monkeypatch.setattr(batch_generation, "write_manifest", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(ValueError, match="make room, and run the same command again") as found:
        run(inputs, output)
    assert found.value.__notes__ == [f"{output / 'manifest.csv'} could not be written: No space left on device"]


def test_a_sidecar_with_unencodable_text_does_not_end_the_run(inputs, output):
    change(output / "a_000.json", mask={"file": "\ud800.nii.gz", "sha256": "0"})
    run(inputs, output, "--masks", str(inputs / "masks" / "b.nii.gz"))
    assert listed(output) == ["a_000.nii.gz", "b_000.nii.gz"]


def test_a_checked_volume_that_is_not_finite_is_refused_alone(inputs, tmp_path, spoiled, monkeypatch):
    """Both masks have one padded grid, so they share a batch."""
    passing = Rejection([Check("copy_check", lambda image, in_box: (False, {}), lambda found: "")], 3)
    monkeypatch.setattr(batch_generation, "load_rejection", lambda *_: passing)
    (tmp_path / "masks").mkdir()
    for stem, planes in {"a": 5, "c": 8}.items():
        nib.save(mask_image((8, 8, planes)), tmp_path / "masks" / f"{stem}.nii.gz")
    expected = r"(?s)all others are finished\):\na_000.nii.gz: the volume of seed \d+: voxels are not finite"
    with pytest.raises(ValueError, match=expected):
        run(inputs, tmp_path / "out", "--masks", str(tmp_path / "masks"))
    names = sorted(path.name for path in (tmp_path / "out").glob("[!.]*"))
    assert names == ["c_000.json", "c_000.nii.gz", "manifest.csv", "preview.png"]


def test_the_pipeline_writes_all_others_of_a_call_too(inputs, tmp_path, spoiled):
    pipe = MedVolumePipeline.from_pretrained(inputs)
    pipe.set_progress_bar_config(disable=True)
    masks = [inputs / "masks" / f"{stem}.nii.gz" for stem in "ab"]
    with pytest.raises(VoxelError, match="a.nii: the volume of seed .*not finite"):
        pipe(masks, num_inference_steps=1, paths=[tmp_path / "a.nii", tmp_path / "b.nii"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.nii"]
    for output_type in ("nifti", "np", "pt"):
        with pytest.raises(VoxelError, match="the volume of seed .*not finite"):
            pipe(masks[0], num_inference_steps=1, output_type=output_type)
    pipe(masks[0], num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, np.float32), (-np.inf, np.float32), (1e300, np.float64)])
def test_an_image_that_is_not_finite_is_not_written(tmp_path, value, dtype):
    record = {"synthetic": True, "software": "s", "model": "m", "seed": 1}
    array = np.zeros((2, 2, 2), dtype)
    array[0, 0, 0] = value
    image = nib.Nifti1Image(array, np.eye(4))
    image.set_data_dtype(np.float32)
    with pytest.raises(VoxelError, match="a.nii: voxels"):
        write_synthetic(image, record, tmp_path / "a.nii")
    assert not list(tmp_path.iterdir())
