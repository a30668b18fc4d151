"""Quality against steps and guidance: evaluations are counted, figures are those of planted volumes, a stopped run
resumes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from planted_volumes import loaded
from sampler_reports import GOOD, entry_of, write_choice
from smooth import smooth_volumes
from tiny import labels_of, tiny_pipeline

from benchmarks.phantom_set import write_section
from evaluation import Pair, label_values, load_pairs
from evaluation.metrics.features import RandomStatistics
from evaluation.studies import samplers
from evaluation.studies.sampler_figures import (
    Combination,
    SamplerScorer,
    inputs_from_dataset,
    make_named,
    sample,
)
from evaluation.studies.sampler_report import apply_choice, choose, combination_of, markdown, named
from pipelines import MedVolumePipeline, SamplingSettings
from volumes import Case, DataConfig, Volume, VolumeDataset, load_cases, write_volume
from volumes.data.cases import SPLITS

SHAPE = (16, 16, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten volumes with masks as files, five of them for testing; and a pipeline that can be guided."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, array in enumerate(smooth_volumes(10, 0, SHAPE)):
        labels = labels_of((4, 4, 4), number).repeat(4, 0).repeat(4, 1).repeat(4, 2)
        write_volume(Volume((1000 * array).astype(np.float32), np.eye(4)), folder / "images" / f"v{number}.nii.gz")
        write_volume(Volume(labels[None], np.eye(4)), folder / "labels" / f"v{number}.nii.gz")
        rows.append((f"v{number}", f"s{number}", "test" if number > 4 else "train"))
    labels = {0: "background", 2: "anterior", 5: "posterior"}
    section = write_section(folder, rows, validation_fraction=0.0, label_names=labels)
    tiny_pipeline(condition_dropout={"mask": 0.1}).save_pretrained(folder / "pipeline")
    return folder, DataConfig(**section)


def datasets(config):
    cases = load_cases(config)
    return [VolumeDataset([case for case in cases if case.split == split], config) for split in ("train", "test")]


def test_evaluations_are_counted_and_seeds_are_the_same_for_all(data):
    _, test = datasets(data[1])
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    inputs, scheduler = inputs_from_dataset(test, pipe.unet), pipe.scheduler
    for name, guidance, expected in (("euler", 1.0, 3), ("heun", 1.0, 5), ("unipc", 1.0, 3), ("euler", 2.0, 6)):
        made, cost = sample(pipe, inputs, Combination(name, 3, guidance), batch_size=2)
        assert cost["evaluations_per_volume"] == expected, name
        assert len(made) == 5 and all(volume.shape == (1, *SHAPE) for volume in made)
        assert 0 < cost["seconds_per_volume"]["lowest"] <= cost["seconds_per_volume"]["median"]
    assert pipe.scheduler is scheduler and not pipe.unet._forward_pre_hooks
    first, _ = sample(pipe, inputs, Combination("own", 3, 1.0), batch_size=5)
    second, cost = sample(pipe, inputs, Combination("euler", 3, 1.0), batch_size=1)
    assert cost["scheduler_class"] == "FlowMatchEulerDiscreteScheduler"
    np.testing.assert_allclose(first, second, atol=1e-4)
    generator = torch.Generator().manual_seed(4)
    again = pipe(inputs.masks[4], num_inference_steps=3, generator=[generator], output_type="np").volumes[0]
    np.testing.assert_allclose(first[4], (again - 100) / 200, atol=1e-4)


class Threshold(torch.nn.Module):
    """A segmenter that finds the labels in the intensities: bright is posterior, dark is background."""

    def __init__(self):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1, 1))

    def forward(self, images):
        return -((images - self.levels) ** 2)


def test_figures_of_planted_volumes(data):
    train, test = datasets(data[1])
    labels = [one.mask.array for one in loaded(test)]
    same = [(indices / 2).astype(np.float32) for indices in labels]  # volumes that obey their masks
    inputs, sets = (
        inputs_from_dataset(test, tiny_pipeline().unet),
        ([(one.image.array + 1) / 2 for one in loaded(train)], list("abcde")),
    )
    assert [mask.array.max() for mask in inputs.masks] == [5] * 5
    pairs = load_pairs([Pair(case) for case in test.cases], data[1], SHAPE)
    pairs.images[:] = torch.from_numpy(np.stack(same))
    extractors = {"random": RandomStatistics()}
    scorer = SamplerScorer(
        inputs, sets, (same, inputs.subjects), same, extractors, Threshold(), pairs, len(label_values(data[1]))
    )
    found = scorer(same)
    assert found["dice"]["generated"] == found["dice"]["real"] == pytest.approx(1)
    assert found["intensity_bias"]["of_means"] == 0 and found["dice"]["difference"]["of_means"] == 0
    assert found["spectrum"]["ratio_db"]["interval"] and found["kernel"]["random"]["whole"] < 0  # copies: below 0
    worse = scorer([np.clip(0.9 * volume[:, ::-1] + 0.05, 0, 1) for volume in same])
    assert worse["dice"]["generated"] < 0.6 and worse["dice"]["difference"]["interval_subjects"][1] < 0
    bias = np.mean([0.05 - 0.1 * volume.mean() for volume in same])
    assert worse["intensity_bias"]["of_means"] == pytest.approx(bias, abs=1e-5)
    quieter = scorer([0.5 + 0.1 * volume for volume in same])
    assert quieter["spectrum"]["difference_db"]["whole"] == pytest.approx(20, abs=0.1)  # a tenth of the amplitude
    assert quieter["kernel"]["random"]["whole"] > found["kernel"]["random"]["whole"]
    with pytest.raises(ValueError, match=r"v5: the real volume is .*set data.spacing"):
        scorer([volume[:, :8] for volume in same])


CHOICES = {
    "the fewest evaluations of those that are as good": (
        [
            entry_of("euler", 20, *GOOD),
            entry_of("unipc", 8, (0.39, 0.2, 0.6), (0.9, 0.5, 1.2), (-0.015, -0.03, 0.0)),
            entry_of("far", 4, (0.41, 0.2, 0.6), *GOOD[1:]),
            entry_of("loud", 4, GOOD[0], (1.1, 0.6, 1.5), GOOD[2]),
            entry_of("vague", 4, *GOOD[:2], (-0.03, -0.05, -0.02)),
        ],
        "unipc",
    ),
    "the lower distance of two that cost the same": (
        [entry_of("euler", 20, (0.3, 0.2, 0.4), *GOOD[1:]), entry_of("heun", 20, *GOOD), entry_of("slow", 40, *GOOD)],
        "heun",
    ),
    "guidance, where the volumes follow their masks only so": (
        [entry_of("euler", 20, *GOOD[:2], (-0.05, -0.06, -0.04)), entry_of("guided", 40, *GOOD, guidance=2.0)],
        "guided",
    ),
    "the best itself, whatever its interval": ([entry_of("euler", 20, *[(0.5, 0.6, 0.7)] * 3)], "euler"),
    "none": (
        [entry_of("euler", 20, *GOOD[:2], (-0.05, -0.06, -0.04)), entry_of("guided", 40, (2.0, 1.0, 3.0), *GOOD[1:])],
        None,
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_rule_chooses(case):
    entries, expected = CHOICES[case]
    for order in (entries, entries[::-1]):
        chosen = choose(order)
        assert (chosen and chosen["scheduler"]) == expected


def test_a_choice_is_written_into_the_pipeline(tmp_path):
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    entries = [entry_of("unipc", 12, *GOOD, steps=6, guidance=2.0)]
    path = write_choice(tmp_path / "samplers.json", entries, model=pipe.model_hash)
    apply_choice(pipe, path, [pipe.model_hash])
    pipe.save_pretrained(tmp_path / "saved")
    loaded = MedVolumePipeline.from_pretrained(tmp_path / "saved")
    assert loaded.sampling_settings == SamplingSettings(6, 2.0) and loaded.model_hash == pipe.model_hash
    assert type(loaded.scheduler).__name__ == "UniPCMultistepScheduler"
    scheduler = loaded.scheduler
    own = entry_of("own", 6, *GOOD, steps=6, scheduler_class="UniPCMultistepScheduler")
    apply_choice(loaded, write_choice(path, [own], model="m"), ["m"])
    assert loaded.scheduler is scheduler and loaded.sampling_settings == SamplingSettings(6, 1.0)


def test_choices_of_test_volumes_or_other_models_are_refused(tmp_path):
    pipe, path = tiny_pipeline(), tmp_path / "samplers.json"
    for entries, settings, said in (
        ([entry_of("euler", 20, *GOOD)], {"model": "m", "split": "test"}, "was measured on test volumes"),
        ([entry_of("euler", 20, *GOOD)], {"model": "other"}, "was measured with another model"),
        ([], {"model": "m"}, "no combination qualifies"),
        (CHOICES["none"][0], {"model": "m"}, "no combination qualifies"),
        ([{"scheduler": "euler"}], {"model": "m"}, "is damaged"),
    ):
        with pytest.raises(ValueError, match=f"samplers.json: {said}"):
            apply_choice(pipe, write_choice(path, entries, **settings), ["m"])
    assert pipe.sampling_settings == SamplingSettings()


def test_a_choice_of_a_replaced_scheduler_is_refused(tmp_path):
    """The hash of a model does not depend on its scheduler."""
    pipe = tiny_pipeline()
    own = entry_of("own", 6, *GOOD, steps=6, scheduler_class="UniPCMultistepScheduler")
    path = write_choice(tmp_path / "samplers.json", [own, entry_of("euler", 20, *GOOD)], model="m")
    said = "own scheduler, then UniPCMultistepScheduler; now it is FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match=said):
        apply_choice(pipe, path, ["m"])
    assert pipe.sampling_settings == SamplingSettings()


def test_a_report_on_validation_volumes_says_what_it_chose():
    report = {"evaluation": "samplers", "settings": {}, "combinations": CHOICES["none"][0]}
    assert "Chosen" not in markdown(report)
    said = markdown({**report, "chosen": {"scheduler": "unipc", "steps": 8, "guidance": 1.5}})
    assert said.splitlines()[-1].startswith("Chosen: unipc in 8 steps, guidance 1.5: the fewest evaluations")
    assert "No combination is as good as the best" in markdown({**report, "chosen": None})


def test_own_settings_of_the_pipeline_are_one_combination(data):
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    more = {"guidance_intervals": [(0.0, 1.0)], "autoguidance": [1.0]}
    options = SimpleNamespace(steps=[4], masks=1, batch_size=1, guidance=[1.0], schedulers=["euler"], **more)
    assert samplers.combinations(pipe, options) == [Combination("own", 20, 1.0), Combination("euler", 4, 1.0)]
    pipe.sampling_settings = SamplingSettings(7, 2.0, (0.2, 0.8))
    assert samplers.combinations(pipe, options)[0] == Combination("own", 7, 2.0, (0.2, 0.8))
    with pytest.raises(ValueError, match="autoguidance_scale 2: the pipeline has no weaker U-Net"):
        samplers.combinations(pipe, SimpleNamespace(**vars(options) | {"autoguidance": [1.0, 2.0]}))


def test_intervals_and_autoguidance_are_combinations(data):
    """An interval without guidance is none. Calls of the weaker U-Net are counted."""
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    pipe.register_modules(unet_weak=tiny_pipeline(1, condition_dropout={"mask": 0.1}).unet)
    options = SimpleNamespace(
        steps=[5],
        masks=1,
        batch_size=1,
        guidance=[1.0, 2.0],
        schedulers=["euler"],
        guidance_intervals=[(0.0, 1.0), (0.3, 0.7)],
        autoguidance=[1.0, 1.5],
    )
    found = [one for one in samplers.combinations(pipe, options) if one.scheduler == "euler"]
    assert [one.guidance_in_words for one in found] == [
        *("1", "1, weak 1.5", "1 in (0.3, 0.7], weak 1.5"),
        *("2", "2, weak 1.5", "2 in (0.3, 0.7]", "2 in (0.3, 0.7], weak 1.5"),
    ]
    _, test = datasets(data[1])
    inputs = inputs_from_dataset(test, pipe.unet)
    spent = [sample(pipe, inputs, one)[1]["evaluations_per_volume"] for one in found]
    assert spent == [5, 10, 7, 10, 15, 7, 9]
    assert not pipe.unet_weak._forward_pre_hooks


def test_a_chosen_interval_and_autoguidance_are_written(tmp_path):
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    entry = entry_of("euler", 12, *GOOD, steps=6, guidance=2.0)
    entry |= {"guidance_interval": [0.2, 0.8], "autoguidance": 1.5}
    path = write_choice(tmp_path / "samplers.json", [entry], model="m")
    with pytest.raises(ValueError, match="chose autoguidance 1.5, and the pipeline has no weaker U-Net"):
        apply_choice(pipe, path, ["m"])
    pipe.register_modules(unet_weak=pipe.unet)
    with pytest.raises(ValueError, match="chose autoguidance 1.5 by another weaker U-Net than the pipeline's"):
        apply_choice(pipe, path, ["m"])
    apply_choice(pipe, write_choice(path, [entry], model="m", unet_weak=pipe.unet_weak_hash), ["m"])
    assert pipe.sampling_settings == SamplingSettings(6, 2.0, (0.2, 0.8), 1.5)
    assert choose([entry]) == {
        **{"scheduler": "euler", "steps": 6, "guidance": 2.0},
        **{"guidance_interval": [0.2, 0.8], "autoguidance": 1.5},
    }
    said = markdown({"evaluation": "samplers", "settings": {}, "combinations": [entry], "chosen": choose([entry])})
    assert "| euler | 6 | 2 in (0.2, 0.8], weak 1.5 | 12 |" in said
    assert said.splitlines()[-1].startswith("Chosen: euler in 6 steps, guidance 2 in (0.2, 0.8], weak 1.5: the fewest")


def test_guidance_without_is_a_setting_of_the_report_and_stays(tmp_path):
    """It acts in all combinations, also without other guidance, so that an interval counts there."""
    pipe, path = tiny_pipeline(), tmp_path / "samplers.json"
    more = {"guidance_intervals": [(0.2, 0.8)], "autoguidance": [1.0]}
    options: Any = SimpleNamespace(steps=[4], masks=1, batch_size=1, guidance=[1.0], schedulers=["euler"], **more)
    own = SamplingSettings(7, None, (0.3, 1.0), guidance_without={"posterior": "anterior"}, without_scale=3.0)
    pipe.sampling_settings = own
    every = samplers.combinations(pipe, options)
    assert every == [
        Combination("own", 7, 1.0, (0.3, 1.0), 1.0, True),
        Combination("euler", 4, 1.0, (0.2, 0.8), 1.0, True),
    ]
    assert every[1].guidance_in_words == "1 in (0.2, 0.8], without labels"
    assert combination_of(named(every[1])) == every[1]
    entry = entry_of("euler", 12, *GOOD, steps=4) | {"guidance_interval": [0.2, 0.8], "without": True}
    with pytest.raises(ValueError, match="was measured with guidance_without None, the pipeline's sampling.json has"):
        apply_choice(pipe, write_choice(path, [entry], model="m"), ["m"])
    without: Any = {"labels": {"posterior": "anterior"}, "scale": 3.0}
    apply_choice(pipe, write_choice(path, [entry], model="m", guidance_without=without), ["m"])
    assert pipe.sampling_settings == replace(
        own, num_inference_steps=4, guidance_scale=1.0, guidance_interval=(0.2, 0.8)
    )
    with pytest.raises(ValueError, match="was measured with another guidance_without"):
        samplers.earlier_report(path, {"model": "m"})


def test_the_command_resumes_and_refuses_other_settings(data, tmp_path):
    """Settings other than those of the earlier measurement."""
    output = tmp_path / "out" / "samplers.json"
    options = ["--pipeline", str(data[0] / "pipeline"), "--config", str(data[0] / "config.yaml"), "--masks", "4"]
    own = [*options, "--output", str(output), "--segmenter_steps", "2", "--shape", "16", "16", "16", "--steps", "1"]
    report = samplers.main([*own, "--schedulers"])
    assert [(one["scheduler"], one["steps"]) for one in report["combinations"]] == [("own", 20)]
    segmenter = output.with_name("samplers_segmenter.safetensors")
    written = segmenter.stat().st_mtime_ns
    after = samplers.main([*own, "--schedulers", "euler", "--guidance", "1", "2"])
    assert after["combinations"][:1] == report["combinations"] and len(after["combinations"]) == 3
    stored = json.loads(output.read_text())["combinations"]
    assert stored == after["combinations"] and segmenter.stat().st_mtime_ns == written
    table = Path(output.with_suffix(".md")).read_text().splitlines()
    assert len(table) == 2 + 3 + 1 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| own (FlowMatchEulerDiscreteScheduler) | 20 | 1 | 20 |")
    with pytest.raises(ValueError, match="was measured with another seed; choose another --output"):
        samplers.main([*own, "--seed", "1"])
    with pytest.raises(ValueError, match="was measured with another data; choose another --output"):
        samplers.main([*own, "--data.label_map", "{9: 2}"])
    with pytest.raises(ValueError, match=r"prepared differently:\n  spacing: it learned .*, the data has 2 x 2 x 2 mm"):
        samplers.main([*own, "--data.spacing", "[2, 2, 2]"])
    with pytest.raises(ValueError, match=r"is a segmenter of .*spacing.*choose another --segmenter"):
        new = str(tmp_path / "c.json")
        samplers.main([*own, "--output", new, "--segmenter", str(segmenter), "--data.label_map", "{9: 2}"])
    with pytest.raises(ValueError, match=r"is a segmenter of .*choose another --segmenter"):
        samplers.main([*options, "--output", str(tmp_path / "b.json"), "--segmenter", str(segmenter)])
    with pytest.raises(ValueError, match="--schedulers ddim: a model that predicts rectified_flow has euler, heun"):
        make_named("ddim", tiny_pipeline())
    pipe = tiny_pipeline(objective="epsilon")
    assert type(make_named("ddim", pipe)).__name__ == "DDIMScheduler"
    assert not make_named("ddpm", pipe).config["clip_sample"]
    pipe.vae.latent_bound = lambda: 3.0
    assert make_named("ddpm", pipe).config["clip_sample_range"] == 3.0  # as it is trained and sampled


def test_settings_can_be_chosen_without_the_test_split():
    cases = [Case(f"{split}{n}", f"{split}{n}", split, mask=Path("m")) for split in SPLITS for n in range(2)]
    test_set, train_set = samplers.splits(cases, "test")
    assert [case.name for case in test_set] == ["test0", "test1"]
    assert {case.split for case in train_set} == {"train", "validation"}
    test_set, train_set = samplers.splits(cases, "validation")
    assert [case.name for case in test_set] == ["validation0", "validation1"]
    assert {case.split for case in train_set} == {"train"}
    with pytest.raises(ValueError, match="split"):
        samplers.splits(cases[:2], "validation")


def test_unsupported_guidance_is_refused_before_any_work(data, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "unguided")
    options = ["--pipeline", str(tmp_path / "unguided"), "--config", str(data[0] / "config.yaml")]
    with pytest.raises(ValueError, match="never trained without mask"):
        samplers.main([*options, "--output", str(tmp_path / "a.json"), "--guidance", "1", "2"])
    assert not (tmp_path / "a.json").exists()
