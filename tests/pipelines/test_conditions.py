"""Classes and numbers as conditions: from the table's cells to the volume, each with an answer that is known."""

import csv
import json
import math
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom_tables import PHANTOM, phantoms
from short_runs import run
from tiny import labels_of, mask_image, seeded, tiny_data, tiny_pipeline

import generate
import train_ldm
from diffusion import (
    Conditions,
    LatentUNet3D,
    build_latent_cache,
    collate_latents,
    denoise,
    drop_conditions,
    fold_mask,
    make_scheduler,
    training_loss,
)
from diffusion.completion import complete_model
from diffusion.condition_embedding import ConditionEmbedding, fourier_features
from diffusion.latents.cache import LatentCacheConfig, cache_key
from pipelines import MedVolumePipeline, read_sidecar
from pipelines.planning import volume_seed
from training import initialize_from
from training.ldm import init_unet

CLASSES = {"sex": ["F", "M"], "diagnosis": ["none", "benign", "malignant"]}  # not in the order of the alphabet
NUMBERS = {"weight": {"mean": 70.0, "std": 10.0}, "age": {"mean": 50.0, "std": 20.0}}
RANGES = {"weight": NUMBERS["weight"] | {"low": 45, "high": 95}, "age": NUMBERS["age"] | {"low": 20, "high": 80}}
ROOMY = {"sex": 0.2, "diagnosis": 0.2, "weight": 0.2, "age": 0.2}
SMALL = {"channels": (16, 16), "blocks": (1, 1), "attention": (False, True), "head_dim": 8, "mask_width": 8}
NAN = math.nan


def unet_of(**arguments) -> LatentUNet3D:
    """A small U-Net whose zero-initialized layers are not zero, as after training."""
    torch.manual_seed(0)
    unet = LatentUNet3D(**{**SMALL, "classes": CLASSES, "numbers": NUMBERS, **arguments})
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return unet.eval()


# the embedding


def test_a_class_has_its_row_and_an_absent_one_the_first():
    embedding = ConditionEmbedding(CLASSES, {}, 2)
    with torch.no_grad():
        embedding.classes[0].weight.copy_(torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]]))  # diagnosis comes first
        embedding.classes[1].weight.copy_(torch.tensor([[0.0, 0], [0, 10], [0, 20]]))
    given = torch.tensor([[0, 1], [2, 0], [-1, 1], [1, -1], [-1, -1]])
    assert embedding(given, None, torch.float32).tolist() == [[1, 20], [3, 10], [0, 20], [2, 0], [0, 0]]


def test_a_number_is_standardized_and_an_absent_one_is_told():
    features = fourier_features(torch.tensor([50.0, 90.0, 10.0, NAN]), mean=50.0, std=20.0)
    waves = [2 * math.pi * 2 / period for period in (16, 8, 4, 2)]  # of two standard deviations
    above = [*map(math.sin, waves), *map(math.cos, waves), 0]
    below = [*(-math.sin(w) for w in waves), *map(math.cos, waves), 0]
    expected = [[0, 0, 0, 0, 1, 1, 1, 1, 0], above, below, [0] * 8 + [1]]
    torch.testing.assert_close(features, torch.tensor(expected), atol=1e-6, rtol=0)
    usual = fourier_features(torch.linspace(-3.9, 3.9, 40), 0.0, 1.0)[:, 0]
    assert (usual.diff() > 0).all()  # the slowest wave alone tells the order of all usual values


def test_each_number_has_its_own_mean_and_layer():
    embedding = ConditionEmbedding({}, NUMBERS, 2)
    with torch.no_grad():
        for column, layer in enumerate(embedding.numbers):
            layer.weight.zero_()
            layer.weight[column, 0] = 1.0  # the slowest sine
            layer.weight[column, 8] = 5.0  # absent
    given = torch.tensor([[50.0, 70.0], [70.0, 70.0], [50.0, 90.0], [NAN, NAN]])  # age, weight
    expected = [[0, 0], [math.sin(math.pi / 8), 0], [0, math.sin(math.pi / 4)], [5, 5]]
    torch.testing.assert_close(embedding(None, given, torch.float32), torch.tensor(expected), atol=1e-6, rtol=0)


def test_impossible_conditions_are_refused():
    for classes, numbers, message in (
        ({"age": ["a"]}, {"age": {"mean": 0, "std": 1}}, r"\['age'\] name two conditions"),
        ({"mask": ["a"]}, {}, r"\['mask'\] name two conditions"),
        ({"sex": []}, {}, r"\['sex'\] have no values"),
        ({}, {"age": {"mean": 0, "std": 0}}, "'age' needs a finite mean and a std above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentUNet3D(**SMALL, classes=classes, numbers=numbers)
    with pytest.raises(ValueError, match=r"names \['size'\]; the model's conditions are \['age', .*'weight'\]"):
        unet_of(condition_dropout={"size": 0.1})


# the U-Net


def test_conditions_begin_without_effect_on_the_model(tmp_path):
    """A model without conditions is what it was, and a new one with conditions begins as it."""
    plain = unet_of(classes=None, numbers=None)
    assert plain.condition_embedding is None and not any("condition" in key for key in plain.state_dict())
    plain.save_pretrained(tmp_path)
    fresh = LatentUNet3D(**SMALL, classes=CLASSES, numbers=NUMBERS).eval()
    assert all(
        layer.weight.std() > 0.1 for layer in fresh.condition_embedding.classes
    )  # from zero they grow too slowly
    with pytest.raises(ValueError, match="another architecture"):
        initialize_from(fresh, tmp_path)
    assert initialize_from(fresh, tmp_path, new="condition_embedding") == [
        f"condition_embedding.{kind}.{i}" for kind in ("classes", "numbers") for i in range(2)
    ]
    x, timestep = torch.randn(2, 4, 3, 3, 3), torch.tensor([100.0, 700.0])
    given = {"classes": torch.tensor([[1, 0], [-1, 1]]), "numbers": torch.tensor([[30.0, 60.0], [NAN, 80.0]])}
    out = fresh(x, timestep, **given).sample
    torch.testing.assert_close(out, plain(x, timestep).sample)
    out.square().mean().backward()
    for layer in (*fresh.condition_embedding.classes, *fresh.condition_embedding.numbers):
        assert layer.weight.grad.abs().max() > 0


def test_what_is_added_to_a_trained_model_moves_no_name(tmp_path):
    """Layers are counted in the order of names: "age" comes before "weight", "diagnosis" before "sex"."""
    sex, weight = {"sex": CLASSES["sex"]}, {"weight": NUMBERS["weight"]}
    trained = LatentUNet3D(**SMALL, classes=sex, numbers=weight)
    trained.save_pretrained(tmp_path)
    more = LatentUNet3D(**SMALL, classes=CLASSES, numbers=NUMBERS)
    fresh = init_unet(more, tmp_path)
    assert fresh == ["condition_embedding.classes.0", "condition_embedding.numbers.0"]
    for kind in ("classes", "numbers"):
        [was], (added, kept) = (getattr(unet.condition_embedding, kind) for unet in (trained, more))
        assert torch.equal(kept.weight, was.weight) and not added.weight.any()
    wider = LatentUNet3D(**SMALL, classes={"sex": [*CLASSES["sex"], "other"]}, numbers=weight)
    assert init_unet(wider, tmp_path) == ["condition_embedding.classes.0"]
    assert not wider.condition_embedding.classes[0].weight.any()
    with pytest.raises(ValueError, match=r"trained model is conditioned on numbers \['weight'\]"):
        init_unet(LatentUNet3D(**SMALL, classes=sex), tmp_path)


def test_every_condition_counts_and_keeps_its_column_when_saved(tmp_path):
    unet, x = unet_of(), torch.randn(1, 4, 3, 3, 3)
    unet.save_pretrained(tmp_path)
    loaded = LatentUNet3D.from_pretrained(tmp_path)
    assert loaded.condition_schema == unet.condition_schema
    assert unet.condition_schema.classes == ("diagnosis", "sex") and unet.condition_schema.numbers == ("age", "weight")
    base = {"classes": torch.tensor([[2, 0]]), "numbers": torch.tensor([[30.0, 80.0]])}
    outputs = []
    for change in (
        {},
        {"classes": [[0, 0]]},
        {"classes": [[2, 1]]},
        {"numbers": [[60.0, 80]]},
        {"numbers": [[30.0, 60]]},
    ):
        given = base | {key: torch.tensor(value) for key, value in change.items()}
        with torch.no_grad():
            outputs.append(unet(x, 500, **given).sample)
            torch.testing.assert_close(loaded(x, 500, **given).sample, outputs[-1], atol=1e-5, rtol=1e-4)
    assert min((other - outputs[0]).abs().max().item() for other in outputs[1:]) > 1e-3


def test_missing_unwanted_and_unknown_conditions_are_refused():
    """Also conditions of other columns."""
    x, classes, numbers = torch.randn(1, 4, 3, 3, 3), torch.tensor([[0, 0]]), torch.tensor([[1.0, 2.0]])
    for given, message in (
        ({"classes": classes}, "conditioned on 2 numbers.*got none"),
        ({"numbers": numbers}, "conditioned on 2 classes.*got none"),
        ({"classes": classes[:, :1], "numbers": numbers}, r"2 classes: pass classes \(B, 2\).*got a tensor \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            unet_of()(x, 1, **given)
    with pytest.raises(ValueError, match="trained without numbers"):
        unet_of(numbers=None)(x, 1, classes=classes, numbers=numbers)
    with pytest.raises(ValueError, match="without classes and numbers"):
        unet_of(classes=None, numbers=None)(x, 1, classes=classes)


def test_a_mask_that_training_dropped_may_be_left_out():
    unet = unet_of(classes=None, numbers=None, num_labels=2, condition_dropout={"mask": 0.1})
    x, padding = torch.randn(1, 4, 3, 3, 3), fold_mask(torch.full((1, 12, 12, 12), -1), (4, 4, 4), 2)
    with torch.no_grad():
        torch.testing.assert_close(unet(x, 5).sample, unet(x, 5, padding).sample)
        assert (unet(x, 5).sample - unet(x, 5, padding + 1).sample).abs().max() > 1e-3


# the data's conditions in latents and model


def test_latents_carry_their_cases_conditions_outside_the_cache(tmp_path):
    """Of every version, from the table as it is now: the files know nothing of them."""
    vae, versions = tiny_pipeline().vae, LatentCacheConfig(versions=2, shift=True)
    plain, dataset = phantoms(), phantoms(**PHANTOM)
    assert cache_key(plain, vae, versions) == cache_key(dataset, vae, versions)
    files = build_latent_cache(plain, vae, tmp_path, versions, progress=False).files
    latents = build_latent_cache(dataset, vae, tmp_path, versions, progress=False)
    assert latents.files == files
    for i in range(len(latents)):
        assert torch.equal(latents[i]["classes"], dataset[i // 2]["classes"])
        assert torch.equal(latents[i]["numbers"], dataset[i // 2]["numbers"])
    batch = collate_latents([latents[3], latents[6]], (4, 4, 4), 0)["conditions"]
    assert batch.as_kwargs().keys() == {"classes", "numbers"}
    assert torch.equal(batch.numbers, torch.stack([dataset[1]["numbers"], dataset[3]["numbers"]]))


def test_the_model_section_is_completed_from_the_data():
    vae, data = tiny_pipeline().vae, tiny_data(classes=CLASSES, numbers=RANGES)
    done = complete_model({"class": "diffusion.LatentUNet3D"}, vae, data)
    assert done["classes"] == CLASSES and done["numbers"] == NUMBERS and done["num_labels"] == 3
    other = {name: {"mean": 1.0, "std": 2.0} for name in NUMBERS}  # of the model that is fine-tuned
    assert complete_model({"numbers": other}, vae, data)["numbers"] == other
    assert complete_model({"num_labels": 0}, vae, data)["num_labels"] == 0  # a model without a mask
    for section in ({"classes": {"sex": ["M", "F"]}}, {"numbers": {"age": NUMBERS["age"]}}, {"num_labels": 4}):
        with pytest.raises(ValueError, match="but autoencoder and data make it"):
            complete_model(section, vae, data)


# a model that must obey: latents about a mean of +-1 by sex, plus (age - 50) / 20, so spread that guidance has room to
# push

GRID = (1, 3, 1, 1)
LEARNED = {"classes": {"sex": ["F", "M"]}, "numbers": {"age": {"mean": 50.0, "std": 20.0}}}


@pytest.fixture(scope="module")
def learned() -> LatentUNet3D:
    torch.manual_seed(0)
    unet = LatentUNet3D(
        1,
        1,
        channels=(16,),
        strides=(),
        blocks=(1,),
        attention=(False,),
        **LEARNED,
        condition_dropout={"sex": 0.2, "age": 0.2},
    )
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(unet.parameters())
    dropout, schema = unet.config["condition_dropout"], unet.condition_schema
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        sex, age = torch.randint(0, 2, (32, 1), generator=generator), 20 + 60 * torch.rand(32, 1, generator=generator)
        mean = (2 * sex - 1 + (age - 50) / 20).view(32, 1, 1, 1, 1)
        latents = mean + 0.8 * torch.randn(32, *GRID, generator=generator)
        conditions = drop_conditions(Conditions(classes=sex, numbers=age), schema, dropout, generator)
        loss = training_loss(unet, "rectified_flow", latents, conditions, torch.ones(32, *GRID), generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return unet.eval()


def mean_of(unet: LatentUNet3D, sex: int = -1, age: float = NAN, scale=1.0) -> float:
    """The mean of 64 volumes sampled for sex and age, always from the same noise."""
    noise = torch.randn(64, *GRID, generator=torch.Generator().manual_seed(1))
    conditions = Conditions(classes=torch.full((64, 1), sex), numbers=torch.full((64, 1), age))
    latents = denoise(
        unet,
        noise,
        make_scheduler("rectified_flow"),
        conditions,
        schema=unet.condition_schema,
        guidance_scale=scale,
        num_inference_steps=10,
    )
    return latents.mean().item()


def test_samples_follow_class_and_number(learned):
    for age in (30.0, 50.0, 70.0):
        for sex in (0, 1):
            assert mean_of(learned, sex, age) == pytest.approx(2 * sex - 1 + (age - 50) / 20, abs=0.3)
    by_age = [mean_of(learned, 1, age) for age in (25.0, 40.0, 55.0, 70.0)]
    assert by_age == sorted(by_age) and by_age[-1] - by_age[0] > 1.5


def test_guidance_pushes_further_and_leaving_out_lies_between(learned):
    woman, man, either = (mean_of(learned, sex, 50.0) for sex in (0, 1, -1))
    assert woman + 0.3 < either < man - 0.3
    assert mean_of(learned, 0, 50.0, {"sex": 2.0}) < woman - 0.2 and mean_of(learned, 1, 50.0, {"sex": 2.0}) > man + 0.2
    young, old, any_age = (mean_of(learned, 0, age) for age in (25.0, 75.0, NAN))
    assert young + 0.3 < any_age < old - 0.3
    assert mean_of(learned, 0, 25.0, {"age": 2.0}) < young - 0.2 and mean_of(learned, 0, 75.0, {"age": 2.0}) > old + 0.2
    assert mean_of(learned, 1, 75.0, 1.5) > mean_of(learned, 1, 75.0) + 0.2


# the pipeline


def pipeline_of(dropout=ROOMY, num_labels: int = 3, **arguments) -> MedVolumePipeline:
    base = tiny_pipeline()
    unet = unet_of(num_labels=num_labels, condition_dropout=dropout, **arguments)
    labels = base.config["data"]["labels"] if num_labels else {}
    data = tiny_data(
        labels=labels, classes=unet.config["classes"] or {}, numbers=RANGES if unet.config["numbers"] else {}
    )
    pipe = MedVolumePipeline(base.vae, unet, base.scheduler, data)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, *args, **given) -> list[torch.Tensor]:
    count = given.pop("volumes", 1)
    return pipe(*args, **given, num_inference_steps=2, generator=seeded(*range(count)), output_type="latent").volumes


MASK = labels_of((8, 8, 8))
FULL = {"classes": {"sex": "F", "diagnosis": "benign"}, "numbers": {"age": 63, "weight": 70.5}}


def test_two_dicts_are_two_calls_and_every_condition_counts():
    pipe = pipeline_of()
    other = {"classes": {"sex": "M"}, "numbers": {"age": 30}}
    both = {key: [FULL[key], other[key]] for key in FULL}
    together = latents_of(pipe, [MASK, MASK], **both, volumes=2)
    alone = pipe(MASK, **other, num_inference_steps=2, generator=seeded(1), output_type="latent").volumes[0]
    torch.testing.assert_close(together[0], latents_of(pipe, MASK, **FULL)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1], alone, atol=1e-5, rtol=1e-4)
    for kind, name, value in (("classes", "sex", "M"), ("classes", "diagnosis", "none"), ("numbers", "age", 30)):
        changed = FULL | {kind: FULL[kind] | {name: value}}
        assert (latents_of(pipe, MASK, **changed)[0] - together[0]).abs().max() > 1e-3
        left_out = FULL | {kind: {key: one for key, one in FULL[kind].items() if key != name}}
        assert (latents_of(pipe, MASK, **left_out)[0] - together[0]).abs().max() > 1e-3
    for one in latents_of(pipe, [MASK, MASK], **FULL, volumes=2)[:1]:  # one dict is for all masks
        torch.testing.assert_close(one, together[0], atol=1e-5, rtol=1e-4)


def test_two_masks_with_two_volumes_each_equal_four_calls():
    """In batches of three, so that one holds volumes of both masks; records too are each of its own volume."""
    pipe = pipeline_of()
    masks = [mask_image((8, 8, 8), seed=seed) for seed in (1, 2)]
    classes = [{"sex": "F", "diagnosis": "benign"}, {"sex": "M"}]
    numbers = [{"age": 63, "weight": 70.5}, {"age": 30}]
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    together = pipe(
        masks,
        classes=classes,
        numbers=numbers,
        num_volumes_per_mask=2,
        generator=seeded(*range(4)),
        batch_size=3,
        **settings,
    )
    for i, (latents, record) in enumerate(zip(together.volumes, together.provenance, strict=True)):
        own = {"classes": classes[i // 2], "numbers": numbers[i // 2]}
        alone = pipe(masks[i // 2], **own, generator=seeded(i), **settings)
        torch.testing.assert_close(latents, alone.volumes[0], atol=1e-5, rtol=1e-4)
        assert record == alone.provenance[0] and record["seed"] == i
        assert {key: record[key] for key in own} == own


def test_without_masks_a_volume_a_dict(tmp_path):
    pipe = pipeline_of(num_labels=0)
    classes = [{"sex": "F"}, {"sex": "M"}]
    volumes = latents_of(pipe, shape=(8, 8, 8), classes=classes, volumes=2)
    alone = pipe(shape=(8, 8, 8), classes=classes[1], num_inference_steps=2, generator=seeded(1), output_type="latent")
    assert len(volumes) == 2
    torch.testing.assert_close(volumes[1], alone.volumes[0], atol=1e-5, rtol=1e-4)
    assert alone.provenance[0]["shape"] == [8, 8, 8] and alone.provenance[0]["mask"] is None


def test_a_mask_may_be_left_out_where_training_did():
    pipe = pipeline_of(ROOMY | {"mask": 0.1})
    free, masked = latents_of(pipe, shape=(8, 8, 8))[0], latents_of(pipe, MASK)[0]
    assert free.shape == masked.shape and (free - masked).abs().max() > 1e-3
    assert torch.equal(
        latents_of(pipe, MASK, guidance_scale={"mask": 0.0})[0], masked
    )  # no guidance, and the mask obeyed
    with pytest.raises(ValueError, match="give a mask, .* or shape"):
        pipe()
    with pytest.raises(ValueError, match="conditioned on a mask"):
        pipeline_of()(shape=(8, 8, 8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"classes": {"gender": "F"}},
            r"classes names gender; this model knows the classes .*sex \(F, M\) and the numbers age",
        ),
        ({"classes": {"sex": "X"}}, r"sex is 'X'; this model knows .*sex \(F, M\)"),
        ({"numbers": {"size": 1}}, r"numbers names size; this model knows .*age \(20 to 80\)"),
        ({"numbers": {"age": NAN}}, "age is nan; give a finite number"),
        ({"numbers": {"age": "old"}}, "age is 'old'; give a finite number"),
        ({"classes": [{"sex": "F"}] * 3}, r"lists of \[3\] dicts for 1 masks"),
        ({"classes": "F"}, "are dicts such as"),
        ({"classes": {"sex": "F"}, "guidance_scale": {"age": 2.0}}, r"names \['age'\]; the conditions given are"),
        ({"guidance_scale": 2.0}, "never trained without mask"),
    ],
)
def test_what_a_model_does_not_know_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of()(MASK, **given, num_inference_steps=1)


def test_what_training_never_left_out_is_needed():
    pipe = pipeline_of({"age": 0.1, "weight": 0.1, "diagnosis": 0.1})
    with pytest.raises(ValueError, match=r"^sex must be given.*sex \(F, M\)"):
        pipe(MASK, classes={"diagnosis": "none"}, num_inference_steps=1)
    with pytest.raises(ValueError, match="knows the classes none and the numbers none"):
        tiny_pipeline()(MASK, classes={"sex": "F"}, num_inference_steps=1)


def test_numbers_far_from_training_are_warned_of():
    pipe = pipeline_of()
    with pytest.warns(UserWarning, match="age is 87, the model was trained on 20 to 80"):
        latents_of(pipe, MASK, numbers={"age": 87})
    with pytest.warns(UserWarning, match="age is 13"):
        latents_of(pipe, MASK, numbers={"age": 13})


@pytest.mark.filterwarnings("error")
def test_numbers_near_training_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latents_of(pipeline_of(), MASK, numbers={"age": 85.9, "weight": 40.1})
    assert not [w for w in caught if "trained on" in str(w.message)]


def test_numbers_of_the_grid_are_taken_from_it():
    names = {"spacing_z": {"mean": 2.0, "std": 1.0}, "size_x": {"mean": 10.0, "std": 4.0}}
    base, unet = tiny_pipeline(), unet_of(num_labels=3, classes=None, numbers=names)
    ranges = {name: of | {"low": 0.5, "high": 20.0} for name, of in names.items()}
    data = tiny_data(spacing=None, numbers=ranges, grid_numbers=sorted(names))
    pipe = MedVolumePipeline(base.vae, unet, base.scheduler, data)
    pipe.set_progress_bar_config(disable=True)
    thick = mask_image((8, 8, 8), np.diag([1.5, 1, 3, 1]))
    own, other = (
        pipe(mask=thick, numbers=numbers, num_inference_steps=2, generator=seeded(0), output_type="np")
        for numbers in (None, {"spacing_z": 1.0})
    )
    assert own.provenance[0]["numbers"] == {"size_x": 12.0, "spacing_z": 3.0}
    assert other.provenance[0]["numbers"] == {"size_x": 12.0, "spacing_z": 1.0}
    assert np.abs(other.volumes[0] - own.volumes[0]).max() > 1e-3


def test_saved_loaded_and_recorded(tmp_path):
    pipe = pipeline_of()
    pipe.save_pretrained(tmp_path)
    loaded = MedVolumePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.data.classes == CLASSES and loaded.config["data"]["numbers"] == RANGES
    torch.testing.assert_close(
        latents_of(loaded, MASK, **FULL)[0], latents_of(pipe, MASK, **FULL)[0], atol=1e-5, rtol=1e-4
    )
    record = loaded(MASK, **FULL, num_inference_steps=1, output_type="latent").provenance[0]
    assert record["classes"] == {"sex": "F", "diagnosis": "benign"} and record["numbers"] == {
        "age": 63.0,
        "weight": 70.5,
    }
    assert json.loads(json.dumps(record)) == record
    with pytest.raises(ValueError, match="the U-Net knows the classes .* data describes none"):
        MedVolumePipeline(pipe.vae, pipe.unet, pipe.scheduler, tiny_data())


# the scripts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with a mask, classes and numbers, beside a mask."""
    folder = tmp_path_factory.mktemp("conditions")
    pipeline_of(ROOMY | {"mask": 0.1}).save_pretrained(folder / "pipeline")
    nib.save(mask_image((8, 8, 8)), folder / "m.nii.gz")
    return folder


def make(folder, table: str, *more: str):
    (folder / "table.csv").write_text(table)
    generate.main([
        *("--pipeline", str(folder / "pipeline"), "--conditions", str(folder / "table.csv"), "--steps", "1"),
        *("--output", str(folder / "out"), *more),
    ])  # fmt: skip


def test_generate_from_a_table(folder):
    table = "mask,name,sex,age\nm.nii.gz,one,F,63\nm.nii.gz,two,M,30\nm.nii.gz,three,,\n"
    make(folder, table)
    records = {name: read_sidecar(folder / "out" / f"{name}_000.nii.gz") for name in ("one", "two", "three")}
    assert [record["classes"] for record in records.values()] == [{"sex": "F"}, {"sex": "M"}, None]
    assert [record["numbers"] for record in records.values()] == [{"age": 63.0}, {"age": 30.0}, None]
    with open(folder / "out" / "manifest.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert [rows[f"{name}_000.nii.gz"][column] for name in records for column in ("sex", "age", "mask")] == [
        *("F", "63.0", "m.nii.gz", "M", "30.0", "m.nii.gz", "", "", "m.nii.gz")
    ]
    pipe = MedVolumePipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    generator = seeded(volume_seed(0, "two", 0))
    given = {"classes": {"sex": "M"}, "numbers": {"age": 30}, "num_inference_steps": 1, "generator": generator}
    expected = np.asarray(pipe(folder / "m.nii.gz", **given).volumes[0].dataobj)
    two = folder / "out" / "two_000.nii.gz"
    np.testing.assert_allclose(np.asarray(nib.load(two).dataobj), expected, atol=0.01)

    (folder / "out" / "one_000.nii.gz").unlink()
    finished = two.stat().st_mtime_ns
    make(folder, table)  # resumes where it stopped
    assert (folder / "out" / "one_000.nii.gz").exists() and two.stat().st_mtime_ns == finished
    with pytest.raises(ValueError, match="two_000.nii.gz: was generated with another classes"):
        make(folder, table.replace("two,M", "two,F"))


def test_generate_from_a_table_without_masks(folder, tmp_path):
    make(folder, "sex\nF\nM\n", "--shape", "8", "8", "5", "--output", str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.nii.gz")) == ["row_0001_000.nii.gz", "row_0002_000.nii.gz"]
    assert nib.load(tmp_path / "row_0002_000.nii.gz").shape == (8, 8, 5)
    assert read_sidecar(tmp_path / "row_0002_000.nii.gz")["classes"] == {"sex": "M"}
    with pytest.raises(ValueError, match="another shape"):
        make(folder, "sex\nF\nM\n", "--shape", "8", "8", "8", "--output", str(tmp_path))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("gender\nF\n", r"unknown columns \['gender'\]; .* mask, name, diagnosis, sex, age, weight"),
        ("mask,sex\nm.nii.gz,F\nm.nii.gz,M\n", "several rows are called m: line 2 and line 3"),
        ("mask,name,sex\nm.nii.gz,a,F\n,b,M\n", "1 of 2 rows have a mask"),
        ("name,sex\na/b,F\n", "the name 'a/b' has a slash"),
        ("name,sex\na,X\nb,Y\n", r"(?s)a: classes: sex is 'X'.*b: classes: sex is 'Y'"),
        ("mask\n../gone.nii.gz\n", "gone.nii.gz"),
    ],
)
def test_tables_that_cannot_be_are_refused_before_any_work(folder, tmp_path, table, message):
    shape = [] if table.startswith("mask") else ["--shape", "8", "8", "8"]
    with pytest.raises(ValueError, match=message):
        make(folder, table, *shape, "--output", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_model_is_trained_on_the_tables_conditions(tmp_path, vae_folder):
    """From the config to the pipeline; the preview and the validation are of each held-out case's own."""
    data = [
        "--data.classes={class: [bright lesion, dark lesion]}",
        "--data.numbers=[lesion_volume]",
        "--loop.max_steps=4",  # every layer moves from the third on
        '--model.condition_dropout={"mask": 0.1, "class": 0.5}',
    ]
    assert math.isfinite(run(train_ldm, tmp_path, f"--vae={vae_folder}", *data)["loss"])
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config["classes"] == pipe.data.classes == {"class": ["bright lesion", "dark lesion"]}
    standard = pipe.unet.config["numbers"]["lesion_volume"]
    assert standard == {key: getattr(pipe.data.numbers["lesion_volume"], key) for key in ("mean", "std")}
    assert pipe.unet.condition_embedding.numbers[0].weight.abs().max() > 0
    given = {"numbers": {"lesion_volume": standard["mean"]}, "num_inference_steps": 1}
    assert pipe(shape=(12, 12, 12), classes={"class": "dark lesion"}, **given).volumes[0].shape == (12, 12, 12)
