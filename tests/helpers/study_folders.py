"""Folders of real and generated volumes, and studies of them."""

import nibabel as nib
import numpy as np

from reader_study.kit import collect_cases, create_study
from reader_study.voxels import Look

SHAPE = (12, 10, 9)
LOOK = Look()


def smooth(seed):
    """A volume of some texture: sums of waves, in units of their own."""
    random = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(0, 1, size) for size in SHAPE), indexing="ij")
    waves = [np.sin(2 * np.pi * random.uniform(0.5, 2) * axis + random.uniform(0, 6)) for axis in axes]
    return np.sum(waves, axis=0) + 0.1 * random.standard_normal(SHAPE)


def write_sets(folder, count, same=False):
    """Real volumes as scanners store them: few gray levels, oblique headers; generated ones as medvolume does."""
    for name in ("real", "generated"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        levels = np.round(60 + 12 * smooth(number)).astype(np.int16)
        image = nib.Nifti1Image(levels, np.diag([-1.0, 1, 1, 1]))
        image.header["descrip"] = b"scanner 12"
        nib.save(image, folder / "real" / f"mrn_{number:02}.nii.gz")
        values = levels[::-1] if same else 60 + 12 * smooth(1000 + number)
        image = nib.Nifti1Image(np.asarray(values, np.float32), np.eye(4))
        image.header["descrip"] = b"synthetic; medvolume"
        nib.save(image, folder / "generated" / f"mrn_{number:02}_000.nii.gz")
        (folder / "generated" / f"mrn_{number:02}_000.json").write_text('{"synthetic": true}')


def study(folder, plan, look=LOOK, **settings):
    cases = collect_cases([folder / "real"], {"generated": [folder / "generated"]}, None, 0)
    key = create_study(cases, folder / "study", plan=plan, look=look, salt=b"s" * 32, **settings)
    return folder / "study", key
