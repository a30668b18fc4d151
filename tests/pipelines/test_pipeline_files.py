"""`paths=`: volumes that go to disk slab by slab are those that are returned, and never half there."""

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import labels_of, mask_image, seeded, tiny_pipeline

from pipelines import (
    SamplingConfig,
    VolumeRequest,
    describe_mask,
    read_sidecar,
    volume_files,
    write_synthetic,
)
from pipelines import restore as module
from pipelines.inputs import conditions
from volumes import PADDING, read_mask, resample

CT = [{"kind": "window", "low": -1000, "high": 1000}]
TWO_CT = {"channels": ["a", "b"], "intensity": [*CT, {"kind": "window", "low": 0, "high": 400}]}


def stored_as(codes: str, padded: bool = False) -> nib.Nifti1Image:
    """A mask of 7 x 6 x 13 voxels whose file stores its axes as `codes`, in part without a label if `padded`."""
    labels = labels_of((7, 6, 13))
    if padded:
        labels[2:5, :3, 1:10] = PADDING
    image = nib.Nifti1Image(labels, np.array([[0.9, 0.1, 0, 4], [-0.1, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]]))
    to = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), to))


@pytest.mark.parametrize("slab_bytes", [None, 1])  # decoded whole; streamed, a plane of latents at a time
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("codes", "changes"),
    [("RAS", {}), ("LPI", {"intensity": CT}), ("SAR", {}), ("AIL", {"intensity": CT}), ("IPR", TWO_CT)],
)
def test_the_file_is_what_is_returned(codes, changes, suffix, slab_bytes, tmp_path):
    pipe = tiny_pipeline(spacing=None, **changes)
    if slab_bytes:
        pipe.vae.enable_tiling(slab_bytes)
    mask = stored_as(codes, padded=True)
    whole = pipe(mask, num_inference_steps=1, generator=seeded(3))
    write_synthetic(whole.volumes[0], whole.provenance[0], tmp_path / f"whole{suffix}")
    path = tmp_path / "new" / f"case_000{suffix}"
    out = pipe(mask, num_inference_steps=1, generator=seeded(3), paths=path)
    record, intensity = out.provenance[0], pipe.data.intensity
    assert read_sidecar(path) == record == whole.provenance[0]
    files = volume_files(path, record)
    assert out.volumes == [dict(zip("ab", files, strict=True)) if len(intensity) > 1 else path]
    assert len(files) == len(intensity)
    assert sorted(made.name for made in path.parent.iterdir()) == ["case_000.json", *(file.name for file in files)]
    missing = np.asarray(mask.dataobj) == PADDING
    for file, entry, other in zip(files, intensity, volume_files(tmp_path / f"whole{suffix}", record), strict=True):
        assert file.read_bytes() == other.read_bytes()
        image = nib.load(file)
        assert image.get_data_dtype() == (np.int16 if changes else np.float32) and image.shape == mask.shape
        assert (np.asarray(image.dataobj)[missing] == entry.low).all()
        assert (np.asarray(image.dataobj)[~missing] != entry.low).any()


def test_each_slab_is_handed_on_before_the_next_is_decoded(monkeypatch, tmp_path):
    pipe = tiny_pipeline()
    pipe.vae.enable_tiling(1)
    decode, put, decoded, written = pipe.vae.decode_slabs, module.write_slabs, [], []

    def decode_slabs(z):
        for slab in decode(z):
            assert sum(decoded) == sum(written)
            decoded.append(slab.shape[4])
            yield slab

    def write_slabs(path, slabs, *args, **kwargs):
        put(path, (written.append(slab.shape[3]) or slab for slab in slabs), *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode_slabs", decode_slabs)
    monkeypatch.setattr(module, "write_slabs", write_slabs)
    with pytest.warns(UserWarning, match="outside of what the model was trained on"):
        pipe(mask_image((8, 8, 40)), num_inference_steps=1, paths=tmp_path / "a.nii")
    assert len(decoded) > 4 and sum(written) == 40


def test_a_large_mask_is_embedded_in_parts(monkeypatch):
    """Three parts, the last thinner, are the embedding of the whole mask."""
    pipe = tiny_pipeline()
    requests = [VolumeRequest(mask_image((8, 8, 16), seed=seed)) for seed in (1, 2)]
    volumes = pipe.prepare(requests, SamplingConfig())
    with torch.no_grad():
        whole = conditions.condition_tensors(pipe.unet, volumes, pipe.device).mask
        monkeypatch.setattr(conditions, "LATENT_PLANES", 3)
        parts = conditions.condition_tensors(pipe.unet, volumes, pipe.device).mask
    assert whole.shape == (2, 8, 2, 2, 4) and whole.std() > 0.1
    torch.testing.assert_close(parts, whole)


def test_several_masks_each_have_their_file(tmp_path):
    pipe = tiny_pipeline()
    masks = [mask_image((8, 8, 8), seed=1), mask_image((7, 8, 5), seed=2)]
    names = [tmp_path / f"{i}.nii.gz" for i in range(4)]
    made = pipe(masks, num_volumes_per_mask=2, num_inference_steps=1, generator=seeded(1, 2, 3, 4), paths=names)
    held = pipe(masks, num_volumes_per_mask=2, num_inference_steps=1, generator=seeded(1, 2, 3, 4))
    assert made.volumes == names and made.provenance == held.provenance
    for path, volume in zip(names, held.volumes, strict=True):
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), np.asarray(volume.dataobj))
    without_masks = tiny_pipeline(num_labels=0, labels={})
    without_masks(shape=(7, 6, 9), num_inference_steps=1, paths=str(tmp_path / "shape.nii"))
    assert nib.load(tmp_path / "shape.nii").shape == (7, 6, 9)


def test_every_file_says_its_own_seed_and_mask(tmp_path):
    """Two masks with two volumes each, in batches of three: sidecar and header are of the very volume beside them."""
    pipe, masks = tiny_pipeline(), [tmp_path / "mask_a.nii", tmp_path / "mask_b.nii"]
    for number, mask in enumerate(masks):
        nib.save(mask_image((8, 8, 8), seed=number), mask)
    paths = [tmp_path / f"{i}.nii.gz" for i in range(4)]
    seeds = (11, 12, 13, 14)
    settings = {"num_inference_steps": 1, "batch_size": 3}
    pipe(masks, num_volumes_per_mask=2, generator=seeded(*seeds), paths=paths, **settings)
    for path, seed, mask in zip(paths, seeds, [masks[0]] * 2 + [masks[1]] * 2, strict=True):
        record, image = read_sidecar(path), nib.load(path)
        assert record["seed"] == seed and record["mask"] == describe_mask(mask)
        assert image.header["descrip"].item().decode().endswith(f" seed {seed}")
        alone = pipe(mask, generator=seeded(record["seed"]), **settings).volumes[0]
        np.testing.assert_allclose(np.asarray(image.dataobj), np.asarray(alone.dataobj), atol=2e-3)


def test_a_mask_that_is_given_twice_is_read_once(monkeypatch, tmp_path):
    """As generate.py gives it for --count; a large mask takes four bytes a voxel until the call ends."""
    pipe, read = tiny_pipeline(), []
    original = pipe.volume_processor.preprocess
    monkeypatch.setattr(pipe.volume_processor, "preprocess", lambda *a: read.append(a[0]) or original(*a))
    first, second = mask_image((8, 8, 8), seed=1), mask_image((8, 8, 8), seed=2)
    nib.save(first, tmp_path / "a.nii")
    masks = [tmp_path / "a.nii", second, str(tmp_path / "a.nii"), second]
    made = pipe(masks, num_inference_steps=1, generator=seeded(1, 2, 3, 4), output_type="np").volumes
    assert read == [tmp_path / "a.nii", second]
    each = [(first, 1), (second, 2), (first, 3), (second, 4)]
    for volume, (mask, seed) in zip(made, each, strict=True):
        alone = pipe(mask, num_inference_steps=1, generator=seeded(seed), output_type="np").volumes[0]
        np.testing.assert_allclose(volume, alone, atol=2e-3)


@pytest.mark.parametrize("slab_bytes", [None, 1])
def test_a_volume_that_is_not_finite_leaves_no_file(slab_bytes, monkeypatch, tmp_path):
    """It shows in the last slab only, when the first is in the file already."""
    pipe = tiny_pipeline()
    if slab_bytes:
        pipe.vae.enable_tiling(slab_bytes)

    def spoil(_, step, timestep, tensors):
        return {"latents": tensors["latents"].index_fill(4, torch.tensor(11), 3e38)}

    mask = mask_image((8, 8, 48))
    with pytest.warns(UserWarning, match="outside of what the model was trained on"):
        pipe(mask, num_inference_steps=1, paths=tmp_path / "good.nii")
        with pytest.raises(ValueError, match="the volume of seed 8 is not finite in float32"):
            pipe(
                mask,
                num_inference_steps=1,
                generator=seeded(8),
                callback_on_step_end=spoil,
                paths=tmp_path / "bad.nii",
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.json", "good.nii"]


@pytest.mark.parametrize("planes", [[4], [8, 4]])
def test_planes_that_do_not_fill_the_grid_are_refused(planes, tmp_path):
    processor = tiny_pipeline().volume_processor
    prepared = processor.preprocess(mask_image((7, 8, 6)))  # padded to 8 planes
    slabs = [torch.zeros(1, 8, 8, count) for count in planes]
    with pytest.raises(ValueError, match=f"gave {sum(planes)} planes for a grid of 8 x 8 x 8 voxels"):
        processor.postprocess(iter(slabs), prepared, "np")
    with pytest.raises(ValueError, match="planes"):
        processor.write(slabs, prepared, tmp_path / "a.nii")
    assert not list(tmp_path.iterdir())


def test_a_large_volume_to_be_resampled_is_held_with_a_warning(monkeypatch, tmp_path, recwarn):
    pipe = tiny_pipeline(intensity=CT)
    coarse = mask_image((5, 6, 7), np.diag([-2.0, 2, 2, 1]))
    nib.save(mask_image((16, 16, 8), np.diag([0.5, 0.5, 1, 1])), tmp_path / "fine.nii")
    again = resample(read_mask(tmp_path / "fine.nii"), (1.0, 1.0, 1.0), nearest=True)  # goes back to its file's grid
    for mask in (coarse, again):
        whole = pipe(mask, num_inference_steps=1, generator=seeded(5)).volumes[0]
        pipe(mask, num_inference_steps=1, generator=seeded(5), paths=tmp_path / "made.nii")
        nib.save(whole, tmp_path / "whole.nii")
        assert (tmp_path / "made.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()
    assert not [warning for warning in recwarn if "held in memory" in str(warning.message)]
    monkeypatch.setattr(module, "LARGE_BYTES", 4 * 5 * 6 * 7 - 1)
    with pytest.warns(UserWarning, match="a volume of 5 x 6 x 7 voxels .* held in memory"):
        pipe(coarse, num_inference_steps=1, paths=tmp_path / "made.nii")


def test_paths_that_cannot_be_are_named_before_any_work(monkeypatch, tmp_path):
    pipe, mask = tiny_pipeline(), mask_image((8, 8, 8))
    monkeypatch.setattr(pipe.unet, "forward", None)
    with pytest.raises(ValueError, match="a.mha: name it .nii.gz or .nii"):
        pipe(mask, paths="a.mha")
    with pytest.raises(ValueError, match="2 different paths for 1 volumes"):
        pipe(mask, paths=["a.nii", "b.nii"])
    with pytest.raises(ValueError, match="1 different paths for 2 volumes"):
        pipe([mask, mask], paths=["a.nii", "a.nii"])
    with pytest.raises(ValueError, match="1 different paths for 2 volumes"):
        pipe([mask, mask], paths=["a.nii", "a.nii.gz"])  # both would have a.json
    with pytest.raises(ValueError, match="leave output_type at 'nifti', not 'np'"):
        pipe(mask, paths="a.nii", output_type="np")
    nib.save(mask, tmp_path / "mask.nii")
    (tmp_path / "b").mkdir()
    with pytest.raises(
        ValueError, match="mask.nii is a mask or an image of this call; write the volume to another file"
    ):
        pipe(tmp_path / "mask.nii", paths=tmp_path / "b" / ".." / "mask.nii")
