"""The model card holds what the results hold, or nothing is shipped."""

import json

import nibabel as nib
import pytest
import torch
from safetensors.torch import load_file
from sampler_reports import GOOD, entry_of, write_choice
from tiny import mask_image, tiny_pipeline

from pipelines import MedVolumePipeline, SamplingSettings
from tools.ship import fill, main, summaries, with_decoder


def test_figures_are_taken_from_the_results_and_formatted():
    values = {"dice": {"ratios": {"synthetic/real": {"of_means": 0.98765}}}, "runs": [{"n": 3}]}
    assert fill("{dice.ratios.synthetic/real.of_means:.3f}, {runs.0.n} runs", values) == "0.988, 3 runs"


def test_a_figure_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="dice.mean, but no result has it"):
        fill("Dice {dice.mean:.2f}", {"dice": {}})


def test_lists_are_summarized():
    ratio = {"0.15-0.20": -0.1, "0.20-0.25": -0.44, "0.25-0.30": 0.96}
    runs = [{"dice": 0.8}, {"dice": 0.9}]
    made = summaries({"reconstruction": {"spectrum": {"ratio_db": ratio}}, "dice": {"scores": {"real": runs}}})
    bands = {"reconstruction": "0.20-0.25: -0.4, 0.25-0.30: +1.0"}
    assert made == {"bands": bands, "scores": {"real": "0.8500 (0.8000, 0.9000)"}}
    assert summaries({"conditions": {"accuracy": 0.8}}) == {"bands": {}, "scores": {}}


def test_a_further_trained_decoder_replaces_the_pipelines_own(tmp_path):
    pipe, other = tiny_pipeline(), tiny_pipeline().vae
    with torch.no_grad():
        other.decoder[-1].weight.mul_(2)
    assert with_decoder(pipe, other).vae is other
    other.register_to_config(_diffusers_version="0.1", _name_or_path="elsewhere")
    assert with_decoder(pipe, other).vae is other  # saved elsewhere, by another version
    shifted = tiny_pipeline().vae
    shifted.set_latent_statistics([0.5] * 4, [1.0] * 4)
    for wrong in (tiny_pipeline(seed=1).vae, shifted):
        with pytest.raises(ValueError, match="encoder or latent statistics differ"):
            with_decoder(pipe, wrong)


def test_noise_is_measured_on_the_pipelines_own_data(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "run")
    config = tmp_path / "other.yaml"
    config.write_text("{output: x, vae: x, model: {}, data: {phantom: {count: 4, shape: [16, 16, 16]}}}")
    (tmp_path / "card.md").write_text("")
    (tmp_path / "examples.csv").write_text("name\none\n")
    command = [str(tmp_path / "run"), str(tmp_path / "out"), f"--results={tmp_path}", f"--card={tmp_path / 'card.md'}"]
    with pytest.raises(ValueError, match="other.yaml: its volumes differ from the pipeline's in channels, shape_range"):
        main([*command, f"--examples={tmp_path / 'examples.csv'}", f"--residual_noise={config}"])
    assert not (tmp_path / "out").exists()


def test_the_settings_that_were_chosen_are_shipped(tmp_path):
    """Of a report on the pipeline that is shipped; without one those of the trained pipeline are."""
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    pipe.sampling_settings = SamplingSettings(30)
    pipe.save_pretrained(tmp_path / "run")
    model = MedVolumePipeline.from_pretrained(tmp_path / "run").model_hash
    (tmp_path / "results").mkdir()
    (tmp_path / "card.md").write_text("")
    (tmp_path / "examples.csv").write_text("name\none\n")
    command = [str(tmp_path / "run"), str(tmp_path / "out"), f"--results={tmp_path / 'results'}"]
    command += [f"--card={tmp_path / 'card.md'}", f"--examples={tmp_path / 'examples.csv'}"]
    main(command)
    assert json.loads((tmp_path / "out" / "sampling.json").read_text()) == {"num_inference_steps": 30}
    report = write_choice(
        tmp_path / "samplers.json", [entry_of("unipc", 12, *GOOD, steps=6, guidance=2.0)], model=model
    )
    main([*command, f"--samplers={report}"])
    shipped = MedVolumePipeline.from_pretrained(tmp_path / "out")
    assert shipped.sampling_settings == SamplingSettings(6, 2.0)
    assert type(shipped.scheduler).__name__ == "UniPCMultistepScheduler"
    write_choice(report, [entry_of("unipc", 12, *GOOD)], model="other")
    with pytest.raises(ValueError, match="samplers.json: was measured with another model"):
        main([*command, f"--samplers={report}"])


def test_settings_stay_with_another_decoder():
    pipe = tiny_pipeline()
    pipe.sampling_settings = SamplingSettings(30)
    assert with_decoder(pipe, tiny_pipeline().vae).sampling_settings == SamplingSettings(30)


def test_a_shipped_folder_is_complete_and_in_half_precision(tmp_path):
    """It has weights, masks, results and a card."""
    tiny_pipeline().save_pretrained(tmp_path / "run")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "dice.json").write_text(json.dumps({"scores": {}, "n": 3}))
    (tmp_path / "card.md").write_text("{dice.n} of {megabytes:.0f} MB")
    (tmp_path / "masks_here").mkdir()
    nib.save(mask_image((8, 8, 8)), tmp_path / "masks_here" / "a.nii.gz")
    (tmp_path / "examples.csv").write_text("mask,name\nmasks_here/a.nii.gz,one\n")
    command = [str(tmp_path / "run"), str(tmp_path / "out"), f"--results={tmp_path / 'results'}"]
    command += [f"--card={tmp_path / 'card.md'}", f"--examples={tmp_path / 'examples.csv'}"]
    main(command)
    assert (tmp_path / "out" / "examples.csv").read_text().split() == ["mask,name", "masks/a.nii.gz,one"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        "masks",
        "results",
        "scheduler",
        "unet",
        "vae",
    ]
    assert (tmp_path / "out" / "README.md").read_text() == "3 of 0 MB"
    stored = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    (tmp_path / "examples.csv").write_text("mask,name\nmasks_here/a.nii.gz,one\nothers/a.nii.gz,two\n")
    with pytest.raises(ValueError, match="two masks have the same file name"):
        main(command)
    (tmp_path / "examples.csv").write_text("name,sex\none,F\n")  # a model without masks
    main(command)
    assert not (tmp_path / "out" / "masks").exists()
