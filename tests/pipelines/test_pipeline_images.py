"""Several channels, and channels that are given: what comes in, what the U-Net sees, what comes out and goes to
disk."""

import csv
import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import labels_of, mask_image, seeded, tiny_pipeline

import generate
from diffusion import fold_images
from evaluation import generated_pairs
from pipelines import describe_mask, read_sidecar, write_synthetic
from pipelines.inputs import conditions
from volumes import PADDING, Case, IntensityScaling, Volume, read_volume, resample

CT = {"kind": "window", "low": -1000.0, "high": 1000.0}
PET = {"kind": "percentile", "low": 1.0, "high": 9.0, "percentiles": [5.0, 95.0]}
TWO = {"channels": ["pet", "ct"], "intensity": [PET, CT]}  # not in the order of the alphabet
BOTH = {"images": {"ct": 4, "pet": 4}, "condition_dropout": {"ct": 0.5, "pet": 0.5, "mask": 0.1}}
SHAPE = (7, 6, 9)
AFFINE = np.array([[1.0, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]])


def pipeline_of(**changes):
    return tiny_pipeline(**{**BOTH, **TWO, **changes})


@pytest.fixture(scope="module")
def pipe():
    return pipeline_of()


def image_of(seed: int = 0, shape=SHAPE, affine=AFFINE, low=-900.0, high=900.0) -> nib.Nifti1Image:
    voxels = np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)
    return nib.Nifti1Image(voxels, affine)


def mask_of(seed: int = 0) -> nib.Nifti1Image:
    return mask_image(SHAPE, AFFINE, seed)


def reordered(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    to = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), to))


def arrays(pipe, mask, **arguments):
    arguments = {"num_inference_steps": 1, "generator": seeded(3), "output_type": "np"} | arguments
    return pipe(mask, **arguments).volumes[0]


def seen(pipe, monkeypatch, mask, image, **arguments):
    """The image tensors that the U-Net was given."""
    tensors, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: tensors.append(k["image"]) or forward(*a, **k))
    pipe(mask, image=image, num_inference_steps=1, **arguments)
    return tensors


# what is given decides what is generated


def test_a_kept_channel_changes_the_other_and_returns_unchanged(pipe):
    """The kept channel is returned bit for bit."""
    first, second = (arrays(pipe, mask_of(), image={"ct": image_of(seed)}) for seed in (1, 2))
    free = arrays(pipe, mask_of())
    for volume, seed in ((first, 1), (second, 2)):
        assert np.array_equal(volume[1], np.asarray(image_of(seed).dataobj))  # channel order of `data`: pet, ct
        assert volume.dtype == np.float32 and np.abs(volume[0] - free[0]).max() > 0.01
    assert np.abs(first[0] - second[0]).max() > 0.01
    assert torch.equal(torch.from_numpy(first), arrays(pipe, mask_of(), image={"ct": image_of(1)}, output_type="pt"))


def test_nifti_holds_the_channels_that_were_generated(pipe):
    both = pipe(mask_of(), num_inference_steps=1, generator=seeded(3)).volumes[0]
    made = pipe(mask_of(), image={"ct": image_of()}, num_inference_steps=1, generator=seeded(3))
    assert list(both) == ["pet", "ct"] and list(made.volumes[0]) == ["pet"]
    assert both["ct"].get_data_dtype() == np.int16 and both["pet"].get_data_dtype() == np.float32
    array = arrays(pipe, mask_of(), image={"ct": image_of()})
    assert np.array_equal(np.asarray(made.volumes[0]["pet"].dataobj), array[0])
    assert made.provenance[0]["images"] == {"ct": describe_mask(image_of())} and made.provenance[0]["channels"] == [
        "pet"
    ]


def test_the_unet_sees_the_latents_of_the_standardized_image(monkeypatch):
    """PET by its own percentiles, the padding and what the mask calls missing at -1; the other channel's place is 0."""
    pipe = pipeline_of()
    labels = labels_of(SHAPE)
    labels[2:5, :3] = PADDING
    image = image_of(low=0.0, high=50.0)
    (tensor,) = seen(pipe, monkeypatch, nib.Nifti1Image(labels, AFFINE), {"pet": image})
    voxels = np.asarray(image.dataobj)
    scaled = IntensityScaling("percentile", 5, 95).fit(voxels).apply(voxels)
    scaled[labels == PADDING] = -1
    padded = torch.full((1, 2, 8, 8, 12), -1.0)
    padded[0, 0, :7, 1:7, 1:10] = torch.from_numpy(scaled)
    with torch.no_grad():
        latents = pipe.vae.encode(padded, return_dict=False)[0].mode()[:, :4]
    torch.testing.assert_close(tensor, fold_images({"pet": latents}, BOTH["images"], (2, 2, 3)))
    assert not tensor[:, :5].any() and (tensor[:, 9] == 1).all()


def test_each_volume_has_its_own_images_in_any_batch(monkeypatch):
    pipe = pipeline_of()
    images = [{"ct": image_of(1)}, {"pet": image_of(2)}, {}]
    (tensor,) = seen(pipe, monkeypatch, [mask_of()] * 3, images, output_type="np")
    assert tensor[:, 4, 0, 0, 0].tolist() == [1, 0, 0] and tensor[:, 9, 0, 0, 0].tolist() == [0, 1, 0]
    assert not tensor[2].any()
    settings = {"num_inference_steps": 1, "output_type": "latent"}
    together = pipe([mask_of()] * 3, image=images, generator=seeded(1, 2, 3), **settings).volumes
    for i, (latents, image) in enumerate(zip(together, images, strict=True)):
        alone = pipe(mask_of(), image=image, generator=seeded(i + 1), **settings).volumes[0]
        torch.testing.assert_close(latents, alone, atol=1e-5, rtol=1e-4)


def test_an_image_is_encoded_once_for_all_of_its_volumes(pipe, monkeypatch):
    encoded, encode = [], conditions.image_condition
    monkeypatch.setattr("pipelines.base.image_condition", lambda *a: encoded.append(a[3]) or encode(*a))
    mask, image = mask_of(), image_of()
    pipe([mask, mask], image={"ct": image}, num_volumes_per_mask=2, num_inference_steps=1, batch_size=1)
    assert len(encoded) == 1


# what an image may be


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_an_image_is_the_same_from_any_orientation_and_source(pipe, codes, tmp_path):
    image, mask = image_of(), reordered(mask_of(), codes)
    nib.save(reordered(image, "PIR"), tmp_path / "ct.nii.gz")
    stored = np.asarray(reordered(image, codes).dataobj)  # an array is in the order of the mask's file
    kinds = [
        tmp_path / "ct.nii.gz",
        image,
        Volume(np.asarray(image.dataobj)[None], AFFINE),
        stored,
        torch.from_numpy(np.ascontiguousarray(stored))[None],
    ]
    volumes = [arrays(pipe, mask, image={"ct": kind}) for kind in kinds]
    assert np.array_equal(volumes[0][1], stored)
    for volume in volumes[1:]:
        assert np.array_equal(volume, volumes[0])


def test_without_a_mask_the_image_sets_the_grid(tmp_path):
    for pipe in (pipeline_of(), pipeline_of(num_labels=0, labels={}, condition_dropout={"ct": 0.5, "pet": 0.5})):
        flipped = reordered(image_of(), "LPS")
        made = pipe(image={"ct": flipped}, num_inference_steps=1, generator=seeded(1)).volumes[0]["pet"]
        np.testing.assert_allclose(made.affine, flipped.affine)
        assert made.shape == flipped.shape
        assert arrays(pipe, None, image={"ct": np.asarray(image_of().dataobj)}).shape == (2, *SHAPE)
        two = pipe(image=[{"ct": image_of()}, {"pet": image_of(1, (8, 8, 8))}], num_inference_steps=1).volumes
        assert [(list(one), next(iter(one.values())).shape) for one in two] == [(["pet"], SHAPE), (["ct"], (8, 8, 8))]
        with pytest.raises(ValueError, match="give shape|or shape="):
            pipe(shape=SHAPE, image={"ct": image_of()})


@pytest.mark.parametrize("with_mask", [True, False])
def test_another_spacing_is_resampled_and_the_input_returned(pipe, with_mask):
    """A channel that is kept is returned as it was."""
    fine = AFFINE @ np.diag([0.5, 0.5, 1, 1])
    image, mask = image_of(shape=(14, 12, 9), affine=fine), mask_image((14, 12, 9), fine)
    with pytest.warns(UserWarning, match="the model was trained at 1 x 1 x 1 mm; the (mask|image) is resampled"):
        volume = arrays(pipe, mask if with_mask else None, image={"ct": image})
        made = pipe(mask if with_mask else None, image={"ct": image}, num_inference_steps=1).volumes[0]["pet"]
    assert volume.shape == (2, 14, 12, 9) and np.array_equal(volume[1], np.asarray(image.dataobj))
    np.testing.assert_allclose(made.affine, fine)


def test_an_image_of_another_spacing_is_resampled_then_scaled(monkeypatch):
    """As training does it: percentiles are of the voxels at the model's spacing, and nothing is clipped before."""
    fine = AFFINE @ np.diag([0.5, 0.5, 1, 1])
    image = image_of(shape=(14, 12, 9), affine=fine, low=0.0, high=50.0)
    with pytest.warns(UserWarning, match="is resampled"):
        (tensor,) = seen(pipe := pipeline_of(), monkeypatch, mask_image((14, 12, 9), fine), {"pet": image})
    voxels = resample(read_volume(image), (1, 1, 1)).array[0]
    assert voxels.shape == SHAPE
    padded = torch.full((1, 2, 8, 8, 12), -1.0)
    scaled = IntensityScaling("percentile", 5, 95).fit(voxels).apply(voxels)
    padded[0, 0, :7, 1:7, 1:10] = torch.from_numpy(scaled)
    with torch.no_grad():
        latents = pipe.vae.encode(padded, return_dict=False)[0].mode()[:, :4]
    torch.testing.assert_close(tensor, fold_images({"pet": latents}, BOTH["images"], (2, 2, 3)))


def test_what_cannot_be_given_is_named(pipe, tmp_path):
    shifted = AFFINE.copy()
    shifted[0, 3] += 1
    nan, series = np.asarray(image_of().dataobj).copy(), np.zeros((*SHAPE, 2), np.float32)
    nan[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(nan, AFFINE), tmp_path / "nan.nii")
    refused = [
        (
            {"mr": image_of()},
            "image names mr, which is not a channel of this model; its condition channels are ct, pet",
        ),
        ({"ct": image_of(), "pet": image_of()}, r"image gives all channels \(ct, pet\).*omit one"),
        ({"ct": image_of(affine=shifted)}, "the image 'ct': lies on another grid than the mask .*resample one"),
        ({"ct": nan}, "the image 'ct': 1 of 378 values are not finite"),
        ({"ct": tmp_path / "nan.nii"}, "nan.nii: 1 of 378 values are not finite"),
        (
            {"ct": nib.Nifti1Image(series, AFFINE)},
            "the image 'ct': holds 2 volumes; give the one that shows 'ct' alone",
        ),
        ({"ct": tmp_path / "none.nii"}, "none.nii: no such file"),
        (
            {"ct": np.zeros((3, 3, 3))},
            r"the image 'ct': is an array of \(3, 3, 3\) voxels, the grid of the mask or first image has \(7, 6, 9\)",
        ),
        ({"ct": None}, "the image 'ct': give a path, .* not NoneType"),
        ({"pet": np.ones(SHAPE)}, "the image 'pet': every voxel is 1: it is constant"),
        ("ct.nii", 'are dicts such as .*"ct": "ct.nii.gz".*got \'ct.nii\''),
        ([{}, {}], r"lists of \[2\] dicts for 1 masks"),
    ]
    for image, message in refused:
        with pytest.raises(ValueError, match=message):
            pipe(mask_of(), image=image)
    with pytest.raises(ValueError, match="the image 'pet': lies on another grid than the image 'ct'"):
        three = tiny_pipeline(**BOTH, channels=["pet", "ct", "mr"], intensity=[PET, CT, CT])
        three(image={"ct": image_of(), "pet": image_of(affine=shifted)})
    with pytest.raises(ValueError, match="image names pet, which this model was not trained to take"):
        pipeline_of(images={"ct": 4}, condition_dropout={"ct": 0.5})(mask_of(), image={"pet": image_of()})
    with pytest.raises(ValueError, match="image must give ct, as training never dropped it"):
        pipeline_of(images={"ct": 4}, condition_dropout=None)(mask_of())
    with pytest.raises(ValueError, match="this model was not trained with image conditions; leave image out"):
        tiny_pipeline()(mask_of(), image={"MR": image_of()})
    with pytest.raises(ValueError, match="takes 5 latent channels of ct, the autoencoder gives 4"):
        pipeline_of(images={"ct": 5}, condition_dropout=None)


# guidance


def test_guidance_by_an_image_doubles_its_effect_on_the_latents(pipe):
    """One Euler step is linear in the prediction: scale 2 is the free result plus twice the difference."""

    def latents(image, scale=1.0):
        return pipe(
            mask_of(),
            image=image,
            num_inference_steps=1,
            generator=seeded(3),
            output_type="latent",
            guidance_scale=scale,
        ).volumes[0]

    given = {"ct": image_of()}
    free, plain, guided = latents({}), latents(given), latents(given, {"ct": 2.0})
    assert (plain - free).abs().max() > 0.01
    torch.testing.assert_close(guided, free + 2 * (plain - free), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance_scale names \['pet'\]; the conditions given are \['ct', 'mask'\]"):
        latents(given, {"pet": 2.0})
    always = pipeline_of(images={"ct": 4}, condition_dropout={"mask": 0.1})
    with pytest.raises(ValueError, match="was never trained without ct"):
        always(mask_of(), image=given, guidance_scale={"ct": 2.0})


# files


def test_one_file_per_generated_channel_and_one_sidecar(pipe, tmp_path):
    for name, image in (("both", {}), ("one", {"ct": image_of()})):
        path = tmp_path / name / "a.b_000.nii.gz"
        held = pipe(mask_of(), image=image, num_inference_steps=1, generator=seeded(3))
        out = pipe(mask_of(), image=image, num_inference_steps=1, generator=seeded(3), paths=path)
        assert out.provenance == held.provenance and read_sidecar(path) == out.provenance[0]
        expected = {channel: path.with_name(f"a.b_000_{channel}.nii.gz") for channel in held.volumes[0]}
        assert out.volumes == [expected]
        assert sorted(path.parent.iterdir()) == sorted([path.with_name("a.b_000.json"), *expected.values()])
        for channel, file in expected.items():
            assert np.array_equal(np.asarray(nib.load(file).dataobj), np.asarray(held.volumes[0][channel].dataobj))


def test_no_file_of_two_volumes_or_of_an_image_is_written_over(pipe, tmp_path):
    nib.save(image_of(), tmp_path / "a_pet.nii")
    with pytest.raises(ValueError, match="a_pet.nii is a mask or an image of this call"):
        pipe(mask_of(), image={"ct": tmp_path / "a_pet.nii"}, paths=tmp_path / "a.nii")
    odd = tiny_pipeline(channels=["ct", "low_ct"], intensity=[CT, CT])
    with pytest.raises(ValueError, match="two volumes would write a_low_ct.nii"):
        odd([mask_of()] * 2, paths=["a.nii", "a_low.nii"])


def test_a_channel_of_an_older_volume_is_removed(pipe, tmp_path):
    path = tmp_path / "a.nii"
    pipe(mask_of(), num_inference_steps=1, paths=path)
    pipe(mask_of(), image={"ct": image_of()}, num_inference_steps=1, paths=path)
    assert sorted(left.name for left in tmp_path.iterdir()) == ["a.json", "a_pet.nii"]
    path.with_name("b.json").write_text('{"Modality": "MR"}')
    with pytest.raises(ValueError, match="b.json: is not the sidecar of a generated volume"):
        pipe(mask_of(), num_inference_steps=1, paths=tmp_path / "b.nii")


def test_channels_are_written_by_name_in_any_order(pipe, tmp_path):
    made = pipe(mask_of(), num_inference_steps=1)
    volume, record = made.volumes[0], made.provenance[0]
    write_synthetic(dict(reversed(volume.items())), record, tmp_path / "a.nii")
    for channel in ("ct", "pet"):
        stored = np.asarray(nib.load(tmp_path / f"a_{channel}.nii").dataobj)
        assert np.array_equal(stored, np.asarray(volume[channel].dataobj))
    with pytest.raises(ValueError, match=r"a.nii: got \['ct'\], its record has the channels \['pet', 'ct'\]"):
        write_synthetic({"ct": volume["ct"]}, record, tmp_path / "a.nii")


def test_an_older_volume_is_removed_before_the_new_sidecar(pipe, tmp_path, monkeypatch):
    """Else a run that ends in between would leave older voxels beside a record that calls them finished."""
    path, moved, replace = tmp_path / "a.nii", [], os.replace
    pipe(mask_of(), num_inference_steps=1, paths=path)
    assert len(list(tmp_path.iterdir())) == 3

    def stop(made, to):
        if moved and to.parent == tmp_path:
            raise KeyboardInterrupt
        replace(made, to)
        moved.extend([to] if to.parent == tmp_path else [])

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        pipe(mask_of(), num_inference_steps=1, paths=path)
    assert [left.name for left in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, pipe):
    folder = tmp_path_factory.mktemp("inputs")
    pipe.save_pretrained(folder / "pipeline")
    for seed, name in enumerate(("one", "two")):
        nib.save(mask_of(seed), folder / f"{name}.nii.gz")
        nib.save(image_of(seed), folder / f"{name}_ct_scan.nii.gz")
    (folder / "table.csv").write_text("mask,ct\none.nii.gz,one_ct_scan.nii.gz\ntwo.nii.gz,\n")
    return folder


def generated(inputs, output, *more):
    settings = ["--pipeline", str(inputs / "pipeline"), "--steps", "1", "--output", str(output)]
    generate.main([*settings, *(more or ("--conditions", str(inputs / "table.csv")))])
    return output


def test_a_table_names_the_images_that_are_given(inputs, tmp_path):
    generated(inputs, tmp_path)
    files = ["one_000_pet.nii.gz", "two_000_ct.nii.gz", "two_000_pet.nii.gz"]
    assert sorted(path.name for path in tmp_path.glob("*.nii.gz")) == files
    record = json.loads((tmp_path / "one_000.json").read_text())
    assert record["images"] == {"ct": describe_mask(inputs / "one_ct_scan.nii.gz")}
    with open(tmp_path / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [files[0], f"{files[2]};{files[1]}"]  # in the order of the channels
    assert [row["ct"] for row in rows] == ["one_ct_scan.nii.gz", ""]
    cases = [
        Case(n, n, images={c: inputs / f"{n}_{c}_scan.nii.gz" for c in ("ct", "pet")}, mask=inputs / f"{n}.nii.gz")
        for n in ("one", "two")
    ]
    found = [[path.name for path in pair.generated] for pair in generated_pairs(cases, tmp_path)]
    assert found == [["one_ct_scan.nii.gz", "one_000_pet.nii.gz"], ["two_000_ct.nii.gz", "two_000_pet.nii.gz"]]
    (tmp_path / "two_000_pet.nii.gz").unlink()
    with pytest.raises(
        ValueError, match="two_000.nii.gz: has no file of channel 'pet', and was not conditioned on that of two"
    ):
        generated_pairs(cases, tmp_path)


def test_a_volume_that_lost_one_of_its_files_is_made_again(inputs, tmp_path):
    masks = ["--batch_size", "1", "--masks", str(inputs / "one.nii.gz"), str(inputs / "two.nii.gz")]
    generated(inputs, tmp_path, *masks)
    files = sorted(tmp_path.glob("*.nii.gz"))
    assert [file.name[4:] for file in files] == ["000_ct.nii.gz", "000_pet.nii.gz"] * 2
    content = {file: file.read_bytes() for file in files}
    manifest = (tmp_path / "manifest.csv").read_text()
    times = {file: file.stat().st_mtime_ns for file in files}
    files[2].unlink()  # of the second volume
    generated(inputs, tmp_path, *masks)
    assert {file: file.read_bytes() for file in files} == content
    assert {file for file in files if file.stat().st_mtime_ns != times[file]} == set(files[2:])
    assert (tmp_path / "manifest.csv").read_text() == manifest
    files[3].unlink()
    with pytest.raises(
        ValueError, match="two_000.nii.gz: was generated with another seed"
    ):  # not beside a file of other settings
        generated(inputs, tmp_path, "--masks", masks[-1], "--seed", "1")


def test_unknown_columns_and_mixed_rows_are_refused(inputs, tmp_path):
    for name, text, message in (
        (
            "unknown",
            "mask,CT\none.nii.gz,one_ct_scan.nii.gz\n",
            r"unknown columns 'CT' \(did you mean ct\?\); .* ct, pet",
        ),
        ("mixed", "name,ct\na,one_ct_scan.nii.gz\nb,\n", "1 of 2 rows have an image; split it into two tables"),
        ("both", "mask,ct,pet\none.nii.gz,one_ct_scan.nii.gz,one_ct_scan.nii.gz\n", "one: image gives all channels"),
    ):
        (inputs / f"{name}.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            generated(inputs, tmp_path, "--conditions", str(inputs / f"{name}.csv"))
    (inputs / "alone.csv").write_text("name,ct\na,one_ct_scan.nii.gz\n")
    generated(inputs, tmp_path, "--conditions", str(inputs / "alone.csv"))
    assert nib.load(tmp_path / "a_000_pet.nii.gz").shape == SHAPE
