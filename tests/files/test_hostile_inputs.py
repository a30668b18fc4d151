"""What others hand over: descriptions of training sets, names, special files, DICOM tags, and counts beyond all
measure."""

import contextlib
import os
import signal
import socket
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import mask_image, tiny_data, tiny_pipeline

import generate
from files.atomic import UNFINISHED
from files.documents import read_json, read_yaml
from files.paths import printable, refuse_special
from pipelines import MedVolumePipeline, batch_generation, planning
from pipelines.inputs.request_files import find_masks, mask_requests
from pipelines.planning import PlannedVolume, volume_seed
from training import initialize_from
from volumes import (
    DataConfig,
    PhantomConfig,
    Volume,
    VolumeDataset,
    VolumeError,
    VoxelError,
    describe,
    load_cases,
    read_mask,
    read_volume,
    to_nibabel,
    volume_parts,
    write_dicom,
    write_slabs,
    write_volume,
)
from volumes.data.tables import read_table
from volumes.map_checks import LabelMapStats, describe_maps, measure_map

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX pipes, links and limits")


@contextlib.contextmanager
def at_once(seconds=20):
    """Fail instead of waiting for ever."""

    def late(*_):
        pytest.fail(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# what is not plausible in the description of a training set

MAPS = {
    "labels": {"a": {"mm3": [1.0, 2.0], "pieces": 1, "edge": 0, "always": True}},
    "pieces": 1,
    "shapes": "8x8x8 8x8x12",
}
NAMED = {"0": "background", "1": "a"}


def window(low, high):
    return {"intensity": [{"kind": "window", "low": low, "high": high}]}


@pytest.mark.parametrize(
    ("changes", "entry"),
    [
        (window(-1e299, 1e299), "intensity"),
        (window(0, 1e39), "intensity"),
        (window(-1e31, 0), "intensity"),
        (window(0, 1e-40), "intensity"),
        (window(1e6, 1e6 + 1e-3), "intensity"),
        (window(0, float("inf")), "intensity"),
        (window(float("nan"), 1), "intensity"),
        (window(10**400, 10**401), "intensity"),
        (window(5, 5), "intensity"),
        (window("0", 1), "intensity"),
        ({"spacing": [1e-9, 1, 1]}, "spacing"),
        ({"spacing": [1, 1, 1e9]}, "spacing"),
        ({"affine": np.diag([1e6, 1, 1, 1]).tolist()}, "voxels are 1e.06"),
        ({"shape_range": [[1, 1, 1], [100_000, 8, 8]]}, "shape_range"),
        ({"channels": ["../MR"]}, "channels: the name '../MR' has a slash"),
        ({"channels": ["M\x1b[31mR"]}, "channels: the name .* cannot be seen"),
        ({"channels": ["M" * 300]}, "channels: the name .* longer than"),
        ({"numbers": {"age": {"mean": 1, "std": 0, "low": 1, "high": 2}}}, "numbers.age"),
        ({"numbers": {"age": {"mean": 1, "std": -1, "low": 1, "high": 2}}}, "numbers.age"),
        ({"numbers": {"age": {"mean": 1, "std": 1, "low": 3, "high": 2}}}, "numbers.age"),
        ({"numbers": {"age": {"mean": 1e200, "std": 1, "low": 1, "high": 2}}}, "numbers.age"),
        *(
            ({"image_labels": NAMED, "maps": maps}, "maps")
            for maps in (
                7,
                None,
                [],
                {"shapes": "axb"},
                MAPS | {"shapes": "axb"},
                MAPS | {"shapes": "100000x100000x100000"},
                MAPS | {"shapes": "32768x8x8"},
                MAPS | {"shapes": "8x8"},
                MAPS | {"shapes": "8x8x8x8"},
                MAPS | {"shapes": "8x8x0"},
                MAPS | {"shapes": "8x8x-8"},
                MAPS | {"shapes": ""},
                MAPS | {"shapes": 8},
                MAPS | {"shapes": " ".join(["8x8x8"] * 513)},
                MAPS | {"pieces": "1"},
                MAPS | {"pieces": -1},
                MAPS | {"pieces": True},
                MAPS | {"labels": []},
                MAPS | {"labels": {"b": MAPS["labels"]["a"]}},
                MAPS | {"labels": {"a": 7}},
                MAPS | {"labels": {"a": MAPS["labels"]["a"] | {"mm3": [2.0, 1.0]}}},
                MAPS | {"labels": {"a": MAPS["labels"]["a"] | {"mm3": [0, float("nan")]}}},
                MAPS | {"labels": {"a": MAPS["labels"]["a"] | {"mm3": [0, float("inf")]}}},
                MAPS | {"labels": {"a": MAPS["labels"]["a"] | {"always": 1}}},
                MAPS | {"labels": {"a": MAPS["labels"]["a"] | {"edge": None}}},
            )
        ),
        ({"maps": MAPS}, "maps"),  # of a model that makes no label maps
    ],
)
def test_implausible_descriptions_are_refused_by_entry(changes, entry):
    with pytest.raises(ValueError, match=f"data: .*{entry}|{entry}"):
        tiny_data(**changes)


@pytest.mark.parametrize("name", ["T1/T2", ".hidden", "T1\n", ""])
def test_channels_that_cannot_be_file_names_are_refused_early(name):
    """Before any training."""
    with pytest.raises(ValueError, match="data: images, for files of this channel: the name"):
        DataConfig(images={name: "a/*.nii", "CT": "b/*.nii"})
    assert DataConfig(images={"T1 w": "a/*.nii", "Übersicht": "b/*.nii"}).channels == ["T1 w", "Übersicht"]


def test_a_description_is_checked_before_training(monkeypatch):
    """And not only when the pipeline is saved."""
    config = DataConfig(phantom=PhantomConfig(count=2, shape=(8, 8, 8)))
    train = VolumeDataset(load_cases(config), config)
    assert describe(train).shape_range == ((8, 8, 8), (8, 8, 8))
    monkeypatch.setattr(VolumeDataset, "shapes", [(40_000, 8, 8)])
    with pytest.raises(ValueError, match="data: shape_range"):
        describe(train)


@posix
def test_init_from_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with at_once(), pytest.raises(ValueError, match="model.safetensors: .*a pipe"):
        initialize_from(torch.nn.Linear(1, 1), tmp_path)


def test_descriptions_that_are_plausible_are_taken():
    tiny_data(**window(-1024, 3071))
    tiny_data(**window(0, 1e8))  # Bq/ml
    tiny_data(**window(0, 1e-6))  # m2/s
    tiny_data(image_labels=NAMED, maps=MAPS)
    tiny_data(image_labels={"0": "none", "1": "L/R lung"}, channels=["L/R lung"])  # all labels are in one file
    array = np.zeros((4, 5, 6), np.int16)
    array[1:3, 1:3, 1:3] = 1
    maps = describe_maps(
        [measure_map(one, voxel, {0: "background", 1: "a"}) for one, voxel in ((array, 1.0), (array[:, :4], 1.5))],
        {0: "background", 1: "a"},
    )
    assert LabelMapStats.from_json(maps.to_json(), ["background", "a"]) == maps


# what is not plausible in voxels


@pytest.mark.parametrize(
    ("value", "source", "dtype"),
    [
        (np.nan, np.float32, np.float32),
        (np.inf, np.float32, np.float32),
        (-np.inf, np.float64, np.float32),
        (np.nan, np.float32, np.int16),
        (np.inf, np.float32, np.uint8),
        (1e39, np.float64, np.float32),
        (40_000, np.float32, np.int16),
        (40_000, np.int32, np.int16),
        (-1, np.int16, np.uint8),
        (255.6, np.float32, np.uint8),
    ],
)
def test_voxels_that_do_not_fit_the_file_are_refused(tmp_path, value, source, dtype):
    """Volumes are written whole and in slabs."""
    array = np.zeros((1, 3, 4, 5), source)
    array[0, 1, 2, 3] = value
    volume = Volume(array, np.eye(4))
    with pytest.raises(VoxelError, match="not finite|do not fit"):
        to_nibabel(volume, dtype=dtype)
    grid = read_volume(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4))).source
    assert grid is not None
    with pytest.raises(VoxelError, match="not finite|do not fit"):
        write_slabs(tmp_path / "a.nii.gz", [array[..., :3], array[..., 3:]], grid, dtype)
    if np.dtype(source).kind == "f" and dtype == np.float32:
        with pytest.raises(VoxelError, match="not finite|do not fit"):
            write_volume(volume, tmp_path / "a.nii")
        with pytest.raises(VoxelError, match="not finite|beyond"):
            write_dicom(volume, tmp_path / "a", modality="MR", software="s", model="m")
    assert not list(tmp_path.iterdir())


# what is not a regular file


def special(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.fspath(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@posix
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_only_regular_files_are_read(kind, tmp_path):
    names = ("a.nii", "a.nii.gz", "a.hdr", "a.img", "a.img.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd", "a.dcm", "a")
    with at_once():
        for name in names:
            path = special(kind, tmp_path / name)
            for read in (read_volume, read_mask):
                with pytest.raises(VolumeError, match=f"{name}: is a {kind}, not a regular file"):
                    read(path)
            path.unlink()
        for name, read in {"a.csv": read_table, "a.json": read_json, "a.yaml": read_yaml}.items():
            with pytest.raises(ValueError, match=f"is a {kind}, not a regular file"):
                read(special(kind, tmp_path / name))
        for name in ("b.nhdr", "b.mhd"):
            with pytest.raises(ValueError, match=f"is a {kind}, not a regular file"):
                volume_parts(special(kind, tmp_path / name))


@posix
def test_halves_of_a_volume_are_regular_files(tmp_path):
    image = nib.Nifti1Pair(np.zeros((3, 4, 5), np.int16), np.eye(4))
    for suffix in ("", ".gz"):
        nib.save(image, tmp_path / f"a.hdr{suffix}")
        if not suffix:
            (tmp_path / "a.img").unlink()
        else:
            (tmp_path / "a.img.gz").unlink()
        special("pipe", tmp_path / f"a.img{suffix}")
        with at_once(), pytest.raises(VolumeError, match="is a pipe"):
            read_volume(tmp_path / f"a.hdr{suffix}")
    header = (
        "NRRD0005\ntype: short\ndimension: 3\nspace: RAS\nsizes: 3 4 5\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
        "space origin: (0,0,0)\n"
    )
    (tmp_path / "b.nhdr").write_text(header + "encoding: raw\nendian: little\ndata file: a.img\n")
    with at_once(), pytest.raises(VolumeError, match="a.img"):
        read_volume(tmp_path / "b.nhdr")


@posix
def test_a_pipe_among_masks_images_or_slices_is_refused_by_name(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    nib.save(mask_image((4, 4, 4)), folder / "a.nii.gz")
    special("pipe", folder / "z.nii.gz")
    volume = Volume(np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5), np.eye(4))
    write_dicom(volume, tmp_path / "series", modality="MR", software="s", model="m")
    (tmp_path / "series/0005.dcm").unlink()  # read without it, the volume would have a slice less
    special("pipe", tmp_path / "series/0005.dcm")
    with at_once():
        for pattern in (folder, folder / "*.nii.gz", folder / "z*"):
            with pytest.raises(ValueError, match=r"z.nii.gz: is a pipe"):
                [read_mask(path) for path in find_masks([str(pattern)], tmp_path / "out")]
        with pytest.raises(ValueError, match=r"z.nii.gz: is a pipe"):
            load_cases(DataConfig(root=str(folder), images="*.nii.gz"))
        with pytest.raises(VolumeError, match="0005.dcm: is a pipe"):
            read_volume(tmp_path / "series")
    refuse_special(folder)
    refuse_special(folder / "not there")


# names of which files are made

UNFIT = {
    "a\nb": "cannot be seen",
    "a\x1b[31mb": "cannot be seen",
    "a\u202eb": "cannot be seen",
    ".a": "begins with a dot",
    "a" * 230: "longer than 200 bytes",
    " a": "white space",
    "   ": "white space",
}


@posix
@pytest.mark.parametrize("name", UNFIT)
def test_bad_file_names_of_masks_and_cases_are_refused(tmp_path, name):
    (tmp_path / f"{name}.nii").write_bytes(b"")
    if not name.startswith("."):
        with pytest.raises(ValueError, match=UNFIT[name]) as refused:
            mask_requests([f"{tmp_path}/*"], tmp_path / "out")
        assert str(refused.value).isprintable()
    nib.save(mask_image((4, 4, 4)), tmp_path / "b.nii")
    table = tmp_path / "t.json"
    table.write_text('[{"n": "' + name.replace("\n", "\\n").replace("\x1b", "\\u001b") + '"}, {"n": "b"}]')
    if name == name.strip():
        with pytest.raises(ValueError, match=f"{UNFIT[name]}|line break or control") as refused:
            load_cases(DataConfig(root=str(tmp_path), table="t.json", images="{n}.nii", validation_fraction=0))
        assert str(refused.value).isprintable()
    elif name.strip():
        with pytest.raises(ValueError, match=UNFIT[name]):
            load_cases(DataConfig(root=str(tmp_path), images="*.nii", validation_fraction=0))


@pytest.mark.parametrize(
    ("name", "reason"), [(name, reason) for name, reason in UNFIT.items() if name == name.strip()] + [("a/b", "slash")]
)
def test_names_in_a_table_are_refused_before_any_work(pipeline, tmp_path, name, reason):
    quoted = '"' + name + '"' if "\n" in name else name
    (tmp_path / "c.csv").write_text(f"mask,name\n{pipeline}/a.nii.gz,{quoted}\n")
    with pytest.raises(ValueError, match=f"{reason}|line break or control"):
        run(pipeline, tmp_path / "out", "--conditions", str(tmp_path / "c.csv"))
    assert not (tmp_path / "out").exists()


def test_a_name_too_long_together_with_its_channel_is_refused(tmp_path):
    scale = {"kind": "window", "low": 0.0, "high": 1.0}
    tiny_pipeline(channels=["p" * 100, "ct"], intensity=[scale, scale]).save_pretrained(tmp_path / "p")
    nib.save(mask_image((8, 8, 8)), tmp_path / f"{'m' * 190}.nii.gz")
    with pytest.raises(ValueError, match="more than 255 bytes; shorten it"):
        run(tmp_path / "p", tmp_path / "out", "--masks", str(tmp_path / f"{'m' * 190}.nii.gz"))
    assert not (tmp_path / "out").exists()


def test_names_of_files_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    assert printable("a\x1b[2Jb\u202e\nc\td\udcff") == "a\\x1b[2Jb\\u202e\nc\td\\udcff"
    assert printable("Müller, naïve: größe") == "Müller, naïve: größe"
    with pytest.raises(VolumeError) as refused:
        read_volume(tmp_path / "a\x1b[2J.nii")
    assert "\x1b" not in str(refused.value) and "a\\x1b[2J.nii: no such file" in str(refused.value)


# counts and sizes beyond all measure


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "p"
    tiny_pipeline().save_pretrained(folder)
    nib.save(mask_image((8, 8, 8)), folder / "a.nii.gz")
    return folder


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "p"
    tiny_pipeline(num_labels=0).save_pretrained(folder)
    return folder


def run(pipeline, output, *more):
    generate.main(["--pipeline", str(pipeline), "--output", str(output), "--steps", "1", *more])


def test_more_volumes_than_a_folder_should_hold_are_refused(pipeline, unconditional, tmp_path):
    for count in ("1000000000", "100001"):
        with at_once(), pytest.raises(ValueError, match="one command generates 100000 volumes at most"):
            run(unconditional, tmp_path / "out", "--count", count, "--shape", "8", "8", "8")
    (tmp_path / "c.csv").write_text("mask,name\n" + "".join(f"{pipeline}/a.nii.gz,n{i}\n" for i in range(20)))
    with at_once(), pytest.raises(ValueError, match="for 20 masks or rows: these are 1999980 volumes"):
        run(pipeline, tmp_path / "out", "--conditions", str(tmp_path / "c.csv"), "--count", "99999")
    assert not (tmp_path / "out").exists()


def test_many_volumes_are_planned_within_seconds(unconditional, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_generation, "left_to_generate", lambda tasks: planned.extend(tasks) or [])
    planned: list[PlannedVolume] = []
    with at_once(60):
        run(unconditional, tmp_path, "--count", "20000", "--shape", "8", "8", "8")
    assert len(planned) == 20_000 and planned[-1].path.name == "volume_19999.nii.gz"
    assert planned[-1].record.seed == volume_seed(0, "volume", 19_999) == planned[-1].seed
    assert planned[0].prepared is planned[-1].prepared is not None  # memory grows by little


def test_volumes_and_batches_larger_than_memory_are_refused(unconditional, tmp_path, monkeypatch):
    shapes = {"100000 100000 100000": "at most 32767", "32767 32767 32767": "fit into", "40000 8 8": "at most 32767"}
    for shape, reason in shapes.items():
        with at_once(), pytest.raises(ValueError, match=reason):
            run(unconditional, tmp_path / "out", "--shape", *shape.split())
    monkeypatch.setattr(planning, "memory_bytes", lambda: 1 << 20)
    arguments = ["--count", "1000", "--batch_size", "1000000000", "--shape", "16", "16", "16"]
    # the first feature map of the tiny U-Net: 4 x 4 x 4 cells (stride 4) of 16 channels of 4 bytes: 4 KiB; a quarter of
    # 1 MiB is 64
    with pytest.raises(ValueError, match="1000 volumes of 16 x 16 x 16 voxels at a time .*ask for --batch_size 64$"):
        run(unconditional, tmp_path / "out", *arguments)
    monkeypatch.setattr(planning, "memory_bytes", lambda: 1 << 11)
    with pytest.raises(ValueError, match="ask for smaller volumes"):
        run(unconditional, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


# tags of DICOM files


@pytest.fixture
def series(tmp_path):
    volume = Volume(np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5), np.eye(4))
    write_dicom(volume, tmp_path / "s", modality="CT", software="s", model="m")
    return tmp_path / "s"


def insert(path, element):
    """Put bytes before the pixels."""
    data = path.read_bytes()
    place = data.rindex(struct.pack("<HH", 0x7FE0, 0x0010))
    path.write_bytes(data[:place] + element + data[place:])


def nested(depth):
    start = struct.pack("<HH2sHI", 0x0041, 0x1010, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return start * depth + end * depth


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (nested(10), None),
        (nested(10_000), "cannot be read as DICOM"),
        (struct.pack("<HH2sHI", 0x0041, 0x1010, b"OB", 0, 0xFFFFFFF0), "has no pixels; it is truncated"),
        (struct.pack("<HH2sHI", 0x0041, 0x1010, b"UT", 0, 0x7FFFFFF0), "has no pixels; it is truncated"),
        (b"".join(struct.pack("<HH2sH", 0x0041, 0x1000 + n, b"LO", 2) + b"xx" for n in range(2000)), None),
    ],
)
def test_hostile_tags_of_dicom_take_neither_time_nor_memory(series, element, reason):
    expected = read_volume(series).array
    insert(series / "0001.dcm", element)
    with at_once():
        if reason is None:
            np.testing.assert_array_equal(read_volume(series).array, expected)
            return
        with pytest.raises(VolumeError, match=f"0001.dcm: .*{reason}"):
            read_volume(series)


def test_escape_sequences_in_tags_do_not_reach_the_terminal(series):
    path = series / "0001.dcm"
    path.write_bytes(path.read_bytes().replace(b"MONOCHROME2 ", b"RGB\x1b[31mabcd"))
    with pytest.raises(VolumeError, match="is a color image") as refused:
        read_volume(series)
    assert "\x1b" not in str(refused.value)


# folders of pipelines


def test_a_pipeline_appears_in_one_step_and_other_files_stay(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    folder = tmp_path / "p"
    pipe.save_pretrained(folder)
    assert MedVolumePipeline.from_pretrained(folder).model_hash == pipe.model_hash
    (folder / "README.md").write_text("card")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    other = tiny_pipeline(seed=1)
    saved: list[bytes] = []

    def full(self, *args, **kwargs):
        saved.append((folder / "model_index.json").read_bytes())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(other.unet), "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            other.save_pretrained(folder)
    assert saved and MedVolumePipeline.from_pretrained(folder).model_hash == pipe.model_hash
    other.save_pretrained(folder)
    assert MedVolumePipeline.from_pretrained(folder).model_hash == other.model_hash
    assert (folder / "README.md").read_text() == "card"
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").read_bytes() == b"another variant"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(UNFINISHED)]
    monkeypatch.chdir(folder)
    pipe.save_pretrained(".")
    assert MedVolumePipeline.from_pretrained(folder).model_hash == pipe.model_hash


def test_a_pipeline_killed_between_its_parts_is_none(tmp_path, monkeypatch):
    folder = tmp_path / "p"
    tiny_pipeline().save_pretrained(folder)
    replace = os.rename

    def killed(source, target):
        if Path(target) == folder / "vae":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny_pipeline(seed=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="no model_index.json"):
        MedVolumePipeline.from_pretrained(folder)


@posix
def test_a_pipeline_is_not_written_through_links(tmp_path):
    folder = tmp_path / "p"
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    precious = tmp_path / "precious"
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        precious.write_bytes((folder / name).read_bytes())
        before = precious.read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
        tiny_pipeline(seed=1, description="other").save_pretrained(folder)
        assert precious.read_bytes() == before and not (folder / name).is_symlink()
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(FileExistsError, match="vae: a link is in the place of this folder"):
        pipe.save_pretrained(folder)
