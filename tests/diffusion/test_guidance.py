"""Guidance adds up predictions as its papers say, in one call, and a condition left out is absent and nothing else."""

import numpy as np
import pytest
import torch
from tiny import labels_of, tiny_pipeline

import generate
from diffusion import LatentUNet3D
from diffusion.conditioning import UNCONDITIONED, Conditions, ConditionSchema, drop_conditions
from diffusion.guidance import (
    Guide,
    autoguidance_in_effect,
    autoguided,
    check_guidance,
    guidance_terms,
    guided,
    interval_in_effect,
)
from pipelines.storage.provenance import recorded_guidance

SCHEMA = ConditionSchema(classes=("sex", "scanner"), numbers=("age",))


def conditions(batch: int = 2) -> Conditions:
    return Conditions(
        mask=torch.ones(batch, 1, 2, 2, 2),
        classes=torch.tensor([[1, 2]] * batch),
        numbers=torch.tensor([[0.5]] * batch),
    )


def linear(latents, timestep, given):
    """A model whose prediction is 1 (always) + 10 (mask) + 100 (sex) + 1000 (scanner) + 10000 (age), where present."""
    present = [
        (given.mask.flatten(1) != 0).any(1),
        *(given.classes >= 0).unbind(1),
        ~given.numbers[:, 0].isnan(),
    ]
    value = 1 + sum(10.0 ** (i + 1) * p.float() for i, p in enumerate(present))
    return value.view(-1, 1).expand(len(latents), 3)


def predict(scale) -> torch.Tensor:
    terms = guidance_terms(conditions(), SCHEMA, scale)
    return guided(linear, terms)(torch.zeros(2, 3), torch.tensor(0.0))


def test_one_scale_is_the_formula_of_the_paper():
    everything, nothing = 11111.0, 1.0
    for scale in (1.0, 1.5, 2.5, np.float32(2.5), torch.tensor(3.0), 3):
        assert predict(scale).unique().tolist() == pytest.approx([nothing + float(scale) * (everything - nothing)])


def test_a_scale_per_condition_scales_that_condition_alone():
    assert predict({"sex": 3.0}).unique().tolist() == [11111 + 2 * 100]
    assert predict({"sex": 3.0, "mask": 1.5, "age": 1.0}).unique().tolist() == [11111 + 2 * 100 + 5]
    assert predict({}).unique().tolist() == [11111]


@pytest.mark.parametrize("scale", [None, 0, 0.0, -0.0, 0.3, 1, np.float64(0.5), np.array(0.0), torch.tensor(0.0)])
def test_a_scale_up_to_1_is_no_guidance_as_in_diffusers(scale):
    """The prediction under all conditions, from one term: 0 neither drops the mask nor weakens it."""
    assert predict(scale).unique().tolist() == [11111]
    assert predict({"mask": scale, "sex": 3.0}).unique().tolist() == [11111 + 2 * 100]
    assert (
        len(guidance_terms(conditions(), SCHEMA, scale))
        == len(guidance_terms(conditions(), SCHEMA, {"age": scale}))
        == 1
    )
    check_guidance(scale, {}, {"mask"})  # so a model that never was without its mask may be asked for it
    check_guidance({"mask": scale}, {}, {"mask"})
    assert recorded_guidance(scale) is None and recorded_guidance({"mask": scale}) is None
    assert recorded_guidance({"mask": scale, "sex": 3}) == {"sex": 3.0}


WRONG = [
    -3.0,
    -1e-9,
    float("nan"),
    float("inf"),
    -float("inf"),
    "2",
    True,
    [2.0, 3.0],
    (2.0,),
    np.array([2.0]),
    2j,
    np.bool_(True),
]


@pytest.mark.parametrize("scale", WRONG, ids=repr)
def test_what_is_no_scale_is_refused_by_name(scale):
    for wrong, named in (
        (scale, "guidance_scale must be a number of 0 or more"),
        ({"mask": scale}, "guidance_scale of mask must be a"),
    ):
        for use in (predict, recorded_guidance, lambda one: check_guidance(one, {"mask": 0.1}, {"mask"})):
            with pytest.raises(ValueError, match=named):
                use(wrong)


def test_the_command_line_takes_the_same_scales(capsys):
    given = ["--pipeline", "p", "--output", "o", "--guidance_scale"]
    assert [generate.parse([*given, text]).sampling.guidance_scale for text in ("0", "0.5", "2")] == [0, 0.5, 2]
    for text in ("-1", "nan", "inf", "two"):
        with pytest.raises(SystemExit):
            generate.parse([*given, text])
        assert "--guidance_scale: got" in (said := capsys.readouterr().err) and "expected a number, 0 or more" in said


def test_one_call_a_step_and_none_more_without_guidance():
    calls = []

    def counted(latents, timestep, given):
        calls.append(len(latents))
        return linear(latents, timestep, given)

    for scale, batch in ((1.0, 2), (2.0, 4), ({"sex": 2.0, "age": 2.0}, 6), ({"sex": 1.0}, 2)):
        guided(counted, guidance_terms(conditions(), SCHEMA, scale))(torch.zeros(2, 3), torch.tensor(0.0))
        assert calls.pop() == batch and not calls


def test_names_that_are_no_condition_are_refused():
    with pytest.raises(ValueError, match=r"\['sx'\].*'age', 'mask', 'scanner', 'sex'"):
        guidance_terms(conditions(), SCHEMA, {"sx": 2.0})


def test_without_conditions_a_scale_does_nothing():
    ((weight, kept),) = guidance_terms(Conditions(), SCHEMA, 5.0)
    assert weight == 1 and not kept.as_kwargs()


def test_each_condition_is_dropped_independently_at_its_rate():
    batch = 20_000
    rates = {"mask": 0.1, "sex": 0.5}
    left = drop_conditions(conditions(batch), SCHEMA, rates, torch.Generator().manual_seed(0))
    mask, sex = (left.mask.flatten(1) == 0).all(1), left.classes[:, 0] == -1
    assert mask.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert sex.float().mean().item() == pytest.approx(0.5, abs=0.015)
    assert (mask & sex).float().mean().item() == pytest.approx(0.05, abs=0.006)
    assert (left.classes[:, 1] == 2).all() and not left.numbers.isnan().any()
    assert ((left.mask == 1).flatten(1).all(1) | mask).all()


def test_a_guided_volume_follows_the_formula(tmp_path):
    """One step of the pipeline: the guided latents are the weighted sum of those with and without the mask."""
    pipe, labels = tiny_pipeline(), labels_of((8, 8, 8))
    pipe.unet.register_to_config(condition_dropout={"mask": 0.1})

    def latents(scale, **given) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            labels, num_inference_steps=1, guidance_scale=scale, generator=generator, output_type="latent", **given
        ).volumes[0]

    generator = torch.Generator().manual_seed(0)
    free = pipe(shape=(8, 8, 8), num_inference_steps=1, generator=generator, output_type="latent").volumes[0]
    conditioned, guided_twice = latents(1.0), latents(2.0)
    assert torch.equal(latents(0.0), conditioned) and torch.equal(latents({"mask": 0.5}), conditioned)
    assert (conditioned - free).abs().max() > 1e-3
    assert torch.allclose(guided_twice, 2 * conditioned - free, atol=1e-4)
    assert torch.allclose(latents({"mask": 2.0}), guided_twice, atol=1e-4)
    record = pipe(labels, num_inference_steps=1, guidance_scale={"mask": 2.0}, output_type="latent").provenance[0]
    assert record["guidance_scale"] == {"mask": 2.0}
    unguided = pipe(labels, num_inference_steps=1, guidance_scale={"mask": 1.0}, output_type="latent").provenance[0]
    assert unguided["guidance_scale"] is None


def test_a_model_that_always_saw_its_mask_is_not_guided():
    with pytest.raises(ValueError, match="never trained without mask.*condition_dropout"):
        tiny_pipeline()(labels_of((8, 8, 8)), guidance_scale=2.0)


def test_impossible_dropout_is_refused():
    with pytest.raises(ValueError, match=r"names \['age'\]; the model's conditions are \['mask'\]"):
        LatentUNet3D(channels=(8, 8), head_dim=8, num_labels=2, condition_dropout={"age": 0.1})
    with pytest.raises(ValueError, match="below 1"):
        LatentUNet3D(channels=(8, 8), head_dim=8, num_labels=2, condition_dropout={"mask": 1.0})


def test_a_mask_left_out_is_a_mask_of_padding():
    unet = LatentUNet3D(channels=(8, 8), head_dim=8, num_labels=2, mask_stride=2)
    ids = torch.zeros(1, 4, 4, 4, 8, dtype=torch.int32)
    left_out = Conditions(mask=torch.ones_like(ids)).drop({"mask"}, UNCONDITIONED).mask
    assert torch.equal(left_out, ids) and not unet.embed_mask(ids).any()


def weaker(latents, timestep):
    """A weaker model under all conditions."""
    return torch.full((len(latents), 3), 7.0)


@pytest.mark.parametrize(
    ("scale", "of_conditions"),
    [(1.0, 11111.0), (2.0, 2 * 11111.0 - 1), ({"sex": 3.0, "age": 2.0}, 11111 + 200 + 10000)],
)
def test_autoguidance_adds_the_difference_from_the_weaker_model(scale, of_conditions):
    """Eq. 3 of Karras et al. 2024, 1.5 e - 0.5 weak, and the same difference beside guidance by conditions."""
    guidance = autoguided(linear, guidance_terms(conditions(), SCHEMA, scale), weaker, 1.5)
    found = guidance(torch.zeros(2, 3), torch.tensor(0.0))
    assert found.shape == (2, 3)
    assert found.unique().tolist() == pytest.approx([of_conditions + 0.5 * (11111 - 7)])


def test_outside_of_its_interval_guidance_costs_no_call():
    """(0.2, 0.8]: the lower end is outside, the upper one inside, in float32 too."""
    calls = []

    def counted(latents, timestep, given):
        calls.append(len(latents) // 2)
        return linear(latents, timestep, given)

    def counted_weak(latents, timestep):
        calls.append(1)
        return weaker(latents, timestep)

    guide = Guide(counted, conditions(), SCHEMA, 2.0, (0.2, 0.8), counted_weak, 1.5)
    values, spent = {}, {}
    for level in (1.0, 0.81, float(np.float32(0.8)), 0.5, float(np.float32(0.2)), 0.0):
        values[level] = guide.at(level)(torch.zeros(2, 3), torch.tensor(0.0))[0, 0].item()
        spent[level], calls[:] = sum(calls), []
    inside = 2 * 11111 - 1 + 0.5 * (11111 - 7)
    assert list(values.values()) == pytest.approx([11111, 11111, inside, inside, 11111, 11111])
    assert list(spent.values()) == [1, 1, 3, 3, 1, 1] and guide.calls == 10
    guide.rescale(1.0)
    assert guide.at(0.5)(torch.zeros(2, 3), torch.tensor(0.0))[0, 0].item() == pytest.approx(11111 + 0.5 * 11104)
    assert guide.calls == 12


@pytest.mark.parametrize(
    "interval",
    [0.5, (0.5,), (0.8, 0.2), (0.2, 0.2), (-0.1, 0.5), (0.1, 1.1), "ab", (0, float("nan")), (True, 1), [0, 0.5, 1]],
    ids=repr,
)
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(ValueError, match="guidance_interval must be two noise levels"):
        interval_in_effect(interval)


def test_intervals_and_scales_of_autoguidance_in_effect():
    assert interval_in_effect(None) is None and interval_in_effect((0, 1)) is None
    assert interval_in_effect(np.array([0.25, 1])) == (0.25, 1.0) == interval_in_effect([torch.tensor(0.25), 1])
    assert [autoguidance_in_effect(scale) for scale in (None, 0, 0.5, 1, np.float32(1.5))] == [1, 1, 1, 1, 1.5]
    for wrong in (-1, float("nan"), "2", {"mask": 2.0}, True):
        with pytest.raises(ValueError, match="autoguidance_scale must be a number of 0 or more"):
            autoguidance_in_effect(wrong)
