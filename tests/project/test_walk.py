"""The walk from a mask file to a NIfTI stays as short as it is; its rule is in tests/helpers/walk.py."""

import nibabel as nib
import pytest
from tiny import mask_image, tiny_pipeline
from walk import Walk

import generate
from pipelines import batch_generation

SHAPE = (12, 20, 28)  # in whole cells of 4, which are (3, 5, 7)
MOST_FUNCTIONS, MOST_FILES = 25, 15


@pytest.mark.slow
def test_the_walk_from_a_mask_to_a_file_is_short(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    nib.save(mask_image(SHAPE), tmp_path / "mask.nii.gz")
    args = ["--pipeline", tmp_path / "pipeline", "--masks", tmp_path / "mask.nii.gz", "--output", tmp_path / "out"]
    walk = Walk({SHAPE[:2], (3, 5)})
    monkeypatch.setattr(batch_generation, "write_preview", walk.stop)
    walk.trace(lambda: generate.main([*map(str, args), "--steps", "1"]))
    assert (tmp_path / "out/mask_000.nii.gz").is_file()
    functions = walk.functions()
    for known in ("VolumePipeline.prepare", "denoise", "VolumePipeline._finish", "open_nifti", "generate_to_disk"):
        assert any(function.endswith(f": {known}") for function in functions), known
    assert len(functions) <= MOST_FUNCTIONS, "\n".join(functions)
    files = {function.partition(":")[0] for function in functions}
    assert len(files) <= MOST_FILES, "\n".join(sorted(files))
