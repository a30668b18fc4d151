"""configs/brain_t1: prepare.py, the split, and both trainings at a tiny size on fabricated brains."""

import csv
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from published import CONFIGS, prepare_script, save

import train_ldm
import train_vae
from pipelines import MedVolumePipeline
from training import TrainLdmConfig, TrainVaeConfig, build_model, parse_config
from volumes import load_cases

RECIPE = CONFIGS / "brain_t1"
TABLE = "subject,age,sex,split\nsub-01,39,M,train\nsub-02,50,F,train\nsub-03,28,M,test\nsub-04,44,F,train\n"
SHAPE = (16, 20, 16)


def brains(folder: Path) -> Path:
    """Four balls with three tissues, in the layout that prepare.py reads."""
    away = np.linalg.norm((np.indices(SHAPE) - 8).astype(float), axis=0)
    tissue = np.select([away < 3, away < 5, away < 7], [3, 2, 1], 0).astype(np.uint8)
    for number in range(1, 5):
        noise = np.random.default_rng(number).uniform(0, 20, SHAPE)
        image = np.where(tissue > 0, 60 * tissue + noise, 0).astype(np.uint8)
        for name, array in (("t1", image), ("tissue", tissue), ("brain", (tissue > 0).astype(np.uint8))):
            save(array, folder / f"{name}/sub-{number:02d}.nii.gz", (2.0, 2.0, 2.0))
    (folder / "few.csv").write_text(TABLE)
    return folder


def prepared(folder: Path) -> Path:
    source = brains(folder / "source")
    prepare_script("brain_t1")(source, folder / "data", source / "few.csv")
    return folder / "data"


def test_the_split_is_by_subject(tmp_path):
    rows = list(csv.DictReader((RECIPE / "subjects.csv").open()))
    assert len({row["subject"] for row in rows}) == len(rows) == 62
    assert Counter(row["split"] for row in rows) == {"train": 48, "test": 14}
    for row in rows:
        for name in ("t1", "tissue"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / f"{name}/{row['subject']}.nii.gz").touch()
    (tmp_path / "subjects.csv").write_bytes((RECIPE / "subjects.csv").read_bytes())
    config = parse_config(TrainVaeConfig, ["--config", str(RECIPE / "vae.yaml"), f"--data.root={tmp_path}"])
    cases = load_cases(config.data)
    assert Counter(case.split for case in cases) == {"train": 43, "validation": 5, "test": 14}
    splits = {row["subject"]: row["split"] for row in rows}
    assert all((splits[case.subject] == "test") == (case.split == "test") for case in cases)


def test_files_are_copied_and_bad_ones_refused(tmp_path):
    data = prepared(tmp_path)
    names = [f"{name}/sub-0{n}.nii.gz" for name in ("t1", "tissue") for n in (1, 2, 3, 4)]
    found = sorted(path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file())
    assert found == ["subjects.csv", *names]
    assert all((data / name).read_bytes() == (tmp_path / "source" / name).read_bytes() for name in names)
    source = tmp_path / "source"
    for name, change, said in (
        ("t1", lambda array: array + 1, "t1/sub-01.nii.gz: .* outside of the brain are not 0"),
        ("tissue", lambda array: np.where(array == 3, 4, array), r"tissue/sub-01.nii.gz: has the labels \[4\]"),
        ("brain", lambda array: array * 0, "voxels are 0 where the brain mask is not"),
        ("brain", lambda array: array[1:], "lies on another grid"),
    ):
        path = source / name / "sub-01.nii.gz"
        whole = path.read_bytes()
        array = np.asarray(nib.load(path).dataobj)  # pyright: ignore[reportAttributeAccessIssue]
        save(change(array).astype(np.uint8), path, (2.0, 2.0, 2.0))
        with pytest.raises(ValueError, match=said):
            prepare_script("brain_t1")(source, tmp_path / "again", source / "few.csv")
        path.write_bytes(whole)
    (source / "brain/sub-02.nii.gz").unlink()
    with pytest.raises(ValueError, match="brain/sub-02.nii.gz: no such file"):
        prepare_script("brain_t1")(source, tmp_path / "again", source / "few.csv")
    assert not (tmp_path / "again/subjects.csv").exists()


def test_the_models_fit_into_weights_of_twenty_megabytes():
    count = 0
    for kind, name in ((TrainVaeConfig, "vae"), (TrainLdmConfig, "ldm")):
        config = parse_config(kind, ["--config", str(RECIPE / f"{name}.yaml")])
        model = dict(config.model)
        if name == "ldm":
            ages = {"age": {"mean": 34.0, "std": 9.0}}
            model |= {"in_channels": 16, "out_channels": 16, "num_labels": 4, "classes": config.data.class_names}
            model |= {"numbers": ages}
        count += sum(parameter.numel() for parameter in build_model(model).parameters())
    assert 2 * count < 20e6


@pytest.mark.slow
def test_brains_from_a_map_and_from_nothing(tmp_path):
    """Outside of the asked brain every voxel is 0; without a map as well where the decoded brain is not."""
    data = prepared(tmp_path)
    short = [f"--data.root={data}", "--loop.max_steps=2", "--loop.batch_size=2", "--loop.validate_every=0"]
    short += ["--loop.preview_every=0", "--loop.previews=0", "--loop.checkpoint_every=0", "--loop.trackers=[]"]
    short += ["--loop.mixed_precision=no", "--optimizer.warmup_steps=0", "--data.validation_fraction=0"]
    vae = ["--model.channels=[8, 8]", "--model.decoder_blocks=[1, 1]", "--crops.shape=[8, 8, 8]"]
    ldm = ["--model.channels=[8, 16]", "--model.blocks=[1, 1]", "--model.head_dim=8", "--model.mask_width=4"]
    ldm += ["--cache.versions=2", "--inference_steps=2", "--loop.export=last", f"--vae={tmp_path}/vae/vae"]
    for script, name, own in ((train_vae, "vae", vae), (train_ldm, "ldm", ldm)):
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main(["--config", str(RECIPE / f"{name}.yaml"), f"--output={tmp_path}/{name}", *short, *own])
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "ldm/pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.data.background_threshold is not None
    mask = data / "tissue/sub-03.nii.gz"
    tissue = np.asarray(nib.load(mask).dataobj)  # pyright: ignore[reportAttributeAccessIssue]
    for given in ({"mask": mask}, {"shape": SHAPE}, {"shape": SHAPE, "classes": {"sex": "F"}, "numbers": {"age": 30}}):
        made = pipe(**given, num_inference_steps=2, output_type="np").volumes[0]
        assert np.isfinite(made).all() and made.shape[1:] == SHAPE
        if "mask" in given:
            assert (made[0][tissue == 0] == 0).all() and (made[0][tissue > 0] != 0).any()
