"""The walk from a mask file to a NIfTI stays as short as it is; its rule is in tests/helpers/walk.py."""

import gc
import weakref

import nibabel as nib
import numpy as np
import walk as rule
import yaml
from tiny import mask_image, tiny_pipeline
from walk import Walk

import generate
import train_vae
from pipelines import batch_generation
from training.engine.learner import Learner

SHAPE = (12, 20, 28)  # in whole cells of 4, which are (3, 5, 7)
MAX_FUNCTIONS = 15
MAX_FILES = 12
KNOWN = ("VolumePipeline.prepare", "denoise", "VolumeDecoder.finish", "open_nifti", "generate_to_disk")


def test_the_walk_from_a_mask_to_a_file_is_short(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    nib.save(mask_image(SHAPE), tmp_path / "mask.nii.gz")
    args = ["--pipeline", tmp_path / "pipeline", "--masks", tmp_path / "mask.nii.gz", "--output", tmp_path / "out"]
    walk = Walk({SHAPE[:2], (3, 5)})
    monkeypatch.setattr(batch_generation, "write_preview", walk.stop)
    walk.trace(lambda: generate.main([*map(str, args), "--steps", "1"]))
    assert (tmp_path / "out/mask_000.nii.gz").is_file()
    functions = walk.functions()
    for known in KNOWN:
        assert any(function.endswith(f": {known}") for function in functions), known
    assert len(functions) <= MAX_FUNCTIONS, "\n".join(functions)
    files = {function.partition(":")[0] for function in functions}
    assert len(files) <= MAX_FILES, "\n".join(sorted(files))


def test_the_walk_from_an_image_to_a_training_step_is_short(tmp_path, monkeypatch):
    """Of a prepared volume: preparation reads it in a thread, which is not traced."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        voxels = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"images/{number}.nii.gz")
    loop = {"max_steps": 1, "batch_size": 1, "workers": 0, "trackers": [], "previews": 0, "validate_every": 0}
    layers = {"channels": [8, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}
    config = {
        "output": str(tmp_path / "run"),
        "data": {"root": str(tmp_path), "images": "images/*.nii.gz", "intensity": {"kind": "percentile"}},
        "crops": {"shape": list(SHAPE), "flip_axes": []},
        "model": {"class": "autoencoder.AutoencoderKL3D", **layers},
        "loop": loop | {"checkpoint_every": 0},
    }
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump(config | {"perceptual": None, "adversarial": None}))
    walk, update = Walk({SHAPE[:2]}), Learner.update
    monkeypatch.setattr(Learner, "update", lambda *args: (walk.stop(), update(*args))[1])
    walk.trace(lambda: train_vae.main(["--config", str(tmp_path / "vae.yaml")]))
    functions = walk.functions()
    for known in ("Loop._train", "CropDataset.__getitem__", "VaeTrainingStep.__call__"):
        assert any(function.endswith(f": {known}") for function in functions), known
    assert len(functions) <= 8, "\n".join(functions)
    assert len({function.partition(":")[0] for function in functions}) <= 7, "\n".join(functions)


STEPS = """
import gc

def work(mask):
    gc.collect()
    check(mask)
    chosen = choose(mask)
    box(chosen)
    store(make(chosen))

def choose(mask):
    return mask

def box(mask) -> "object | None":
    return None

def make(mask):
    return mask + 1

def store(mask) -> None:
    written.append(mask.sum())

def check(mask) -> None:
    assert all([part.any() for part in [mask for _ in range(2)]])

def leave(mask) -> None:
    mask.sum()
"""


def traced(folder, monkeypatch, garbage=False) -> list[str]:
    """Return the functions of STEPS that the rule counts, however short they are."""
    path = folder / "steps.py"
    path.write_text(STEPS)
    steps: dict = {"written": []}
    exec(compile(STEPS, str(path), "exec"), steps)
    monkeypatch.setattr(rule, "ROOT", folder)
    monkeypatch.setattr(rule, "LINES", 1)
    mask = np.ones((1, *SHAPE), np.int16)
    if garbage:
        holder = Holder()
        holder.itself = holder
        weakref.finalize(holder, steps["leave"], mask)
        del holder
    walk = Walk({SHAPE[:2]})
    walk.trace(lambda: steps["work"](mask))
    assert steps["written"] == [2 * mask.sum()]
    return [function.partition(": ")[2] for function in walk.functions()]


class Holder:
    """Garbage, if nothing else refers to it."""

    itself: "Holder"


def test_what_brings_a_volume_further_counts(tmp_path, monkeypatch):
    """Not a check, a selection, or a function that finds that there is nothing to do."""
    assert traced(tmp_path, monkeypatch) == ["make", "store", "work"]


def test_garbage_of_earlier_tests_does_not_count(tmp_path, monkeypatch):
    """What is called when garbage is collected in the middle of the walk."""
    gc.disable()
    try:
        assert traced(tmp_path, monkeypatch, garbage=True) == ["make", "store", "work"]
    finally:
        gc.enable()
