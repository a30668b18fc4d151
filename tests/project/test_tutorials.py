"""The blocks of tutorials run, in order, as they are printed; only steps, trials and sizes are fewer."""

import csv
import re
import shlex
import subprocess
from pathlib import Path

import layouts as made
import nibabel as nib
import numpy as np
import pytest
from page_blocks import blocks, commands, run_page
from simulated_readers import write_answers
from tiny import tiny_pipeline

import evaluate
import train_ldm
import train_vae
from pipelines import MedVolumePipeline, read_sidecar
from reader_study.kit import read_key
from reader_study.plan import Setting
from volumes import read_volume

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--loop.max_steps=2", "--loop.batch_size=2", "--loop.validate_every=0", "--loop.checkpoint_every=2"]
SHORT += ["--loop.trackers=[]", "--loop.previews=0", "--optimizer.warmup_steps=0"]
LABELS = {"0": "background", "1": "anterior", "2": "posterior"}


def page(name: str, until: str | None = None) -> str:
    """The text of a page, to the end or up to a line."""
    text = (ROOT / "docs" / name).read_text()
    assert until is None or text.count(until) == 1, until
    return text if until is None else text.partition(until)[0]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scans(folder):
    """CT volumes of 12 patients with masks, and a table of them."""
    rows = [["patient", "sex", "age"]]
    for n in range(12):
        made.save(made.image(n, kind="ct"), folder / f"scans/STS_{n:03d}/CT.nii.gz")
        made.save(made.mask(n, labels=1), folder / f"scans/STS_{n:03d}/tumour.nii.gz")
        rows.append([f"STS_{n:03d}", "FM"[n // 2 % 2], str(40 + 3 * n)])
    with (folder / "scans/patients.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def labels(shape=(28, 32, 24)) -> np.ndarray:
    """Two boxes of the labels 1 and 2 in a background."""
    array = np.zeros(shape, np.int16)
    array[6:12, 8:24, 8:16] = 1
    array[20:26, 4:12, 4:10] = 2
    return array


def map_pipeline() -> MedVolumePipeline:
    """A pipeline of label maps with random weights, whose training maps are said to have been noise too."""
    names = list(LABELS.values())[1:]
    some = {"mm3": [1, 10**4], "pieces": 10**6, "edge": 10**6, "always": False}
    maps = {"labels": dict.fromkeys(names, some), "pieces": 10**6, "shapes": "8x8x8 8x8x12"}
    scale = {"kind": "window", "low": 0.0, "high": 1.0}
    of_maps = {"channels": names, "labels": {}, "image_labels": LABELS, "intensity": [scale] * 2, "maps": maps}
    return tiny_pipeline(5, num_labels=0, **of_maps)


@pytest.mark.slow
@pytest.mark.usefixtures("scans")
def test_conditions(folder):
    fewer = {
        "medvolume train-vae": SHORT,
        "medvolume train-ldm": [*SHORT, "--cache.versions=1", "--inference_steps=2"],
        "medvolume generate": ["--steps", "2"],
        "medvolume evaluate conditions": ["--iterations", "2", "--seeds", "1"],
    }
    found = run_page(page("tutorials/conditions.md"), added=fewer)
    woman, anyone = (np.asarray(found[name].dataobj) for name in ("woman", "anyone"))
    assert woman.shape == made.SHAPE and not np.array_equal(woman, anyone)
    assert read_sidecar("out/wanted/woman_63_000.nii.gz")["classes"] == {"sex": "F"}
    assert not read_sidecar("out/wanted/anyone_000.nii.gz").get("classes")
    assert (folder / "out/sex.json").is_file()


def test_editing(folder):
    pipe = tiny_pipeline(labels=LABELS, shape_range=[[8, 8, 8], [32, 32, 32]])
    pipe.save_pretrained(folder / "weights/hippocampus")
    made.save(labels(), folder / "labels/a.nii.gz", (1, 1, 1))
    made.save(made.image(0, labels().shape), folder / "images/a.nii.gz", (1, 1, 1))
    region = np.zeros(labels().shape, np.uint8)
    region[10:18, 10:18, 8:16] = 1
    made.save(region, folder / "region.nii.gz", (1, 1, 1))
    (folder / "table.csv").write_text("image,mask,region,name\nimages/a.nii.gz,labels/a.nii.gz,region.nii.gz,mine\n")
    run_page(page("editing.md", until="## Border quality"), added={"python edit.py": ["--steps", "2"]})
    before, inside = read_volume("images/a.nii.gz").array[0], region.astype(bool)
    for name in ("a_000", "a_001", "a_002", "mine_000"):
        after = read_volume(f"out/edited/{name}.nii.gz").array[0]
        assert np.array_equal(after[~inside], before[~inside]) and not np.array_equal(after[inside], before[inside])
    with_lesion, without = (nib.load(next(Path("out", way, "masks").glob("*.nii.gz"))) for way in ("with", "without"))
    assert (np.asarray(with_lesion.dataobj) == 2).sum() > (labels() == 2).sum()
    assert not (np.asarray(without.dataobj) == 2).any()


def test_masks_and_volumes_from_nothing(folder):
    pipe = tiny_pipeline(labels=LABELS, condition_dropout={"mask": 0.1})
    pipe.save_pretrained(folder / "weights/hippocampus")
    map_pipeline().save_pretrained(folder / "weights/hippocampus-masks")
    run_page(
        page("from_nothing.md", until="**Comparison"), added={"python generate.py": ["--count", "2", "--steps", "2"]}
    )
    for number in range(2):
        mask, volume = Path(f"out/pairs/masks/map_{number:03d}.nii.gz"), Path(f"out/pairs/map_{number:03d}_000.nii.gz")
        assert nib.load(mask).shape == nib.load(volume).shape
        assert np.allclose(nib.load(mask).affine, nib.load(volume).affine)
    (folder / "configs").symlink_to(ROOT / "configs")
    rest = page("from_nothing.md").partition("**Comparison")[2]
    lines = [line for kind, _, code in blocks(rest) for line in commands(code)]
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("python evaluate.py ")
        evaluate.parse(shlex.split(line)[2:])


@pytest.mark.parametrize("name", ["cluster.md", "many_machines.md"])
def test_scripts_of_a_cluster_are_whole(name):
    """`bash -n` reads them; test_cluster.py has their commands read by the programs."""
    scripts = [code for kind, _, code in blocks(page(name)) if kind == "bash"]
    assert scripts
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{script}\n{done.stderr}"


def test_training_commands_of_many_machines_are_taken(folder):
    (folder / "configs").symlink_to(ROOT / "configs")
    text = page("many_machines.md", until="**Training** is data-parallel.")
    lines = [line for kind, _, code in blocks(text) if not kind for line in commands(code)]
    assert len(lines) == 2
    for line in lines:
        launcher, script, options = re.fullmatch(r"(.*?)(train_vae|train_ldm)\.py (.*)", line).groups()
        {"train_vae": train_vae, "train_ldm": train_ldm}[script].parse(shlex.split(options, comments=True))
        for config in re.findall(r"configs/[\w/]+\.yaml", launcher):
            assert (ROOT / config).is_file()


@pytest.mark.slow
def test_a_readers_study(folder):
    pytest.importorskip("statsmodels", reason="statsmodels is not installed (extra reader-study)")
    pytest.importorskip("krippendorff", reason="krippendorff is not installed (extra reader-study)")
    pytest.importorskip("pingouin", reason="pingouin is not installed (extra reader-study)")
    tiny_pipeline(labels=LABELS).save_pretrained(folder / "weights/hippocampus")
    for n in range(8):
        made.save(made.image(n), folder / f"scans/case_{n}.nii.gz", (1, 1, 1))
        made.save(made.mask(n), folder / f"masks/case_{n}.nii.gz", (1, 1, 1))

    def answer():
        random = np.random.default_rng(0)
        write_answers(folder / "answers", read_key(folder / "study/key.json"), Setting(skill=0.9), random)

    run_page(
        page("reader_study.md"),
        added={
            "medvolume reader-study plan": ["--trials", "2", "--readers", "2", "--volumes", "8"],
            "medvolume generate": ["--steps", "2"],
        },
        before={"medvolume reader-study analyze": answer},
    )
    assert len(list((folder / "study").glob("reader_*/index.html"))) == 3
    assert (folder / "study_report/report.html").is_file()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "a\n\n    one \\\n      two\n\n```python\nx = 1\n```\n",
            [("", "", "one \\\n  two\n"), ("python", "", "x = 1\n")],
        ),
        ('```csv title="a/b.csv"\n    a,b\n```\n', [("csv", "a/b.csv", "    a,b\n")]),
        ("- item\n  continued\n", []),
    ],
)
def test_blocks_of_a_page(text, found):
    assert blocks(text) == found


def test_a_page_that_fails_is_noticed(folder):
    for text in (
        "```python\n1 / 0\n```\n",
        "\n\n    rm -r a\n",
        "```yaml\na: 1\n```\n",
        "\n\n    medvolume demo --x\n",
    ):
        with pytest.raises((ZeroDivisionError, AssertionError, pytest.fail.Exception)):
            run_page(text)
    with pytest.raises(AssertionError, match="no command of the page begins with"):
        run_page("text\n", added={"medvolume generate": []})
    assert run_page('```csv title="a/b.csv"\nx\n```\n\n```python\ny = open("a/b.csv").read()\n```\n')["y"] == "x\n"
