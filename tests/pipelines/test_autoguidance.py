"""A weaker U-Net is part of a pipeline's folder, and guides its volumes; an interval limits guidance to some steps."""

import csv
import json

import nibabel as nib
import pytest
import torch
from accelerate import cpu_offload
from tiny import editor_of, labels_of, mask_image, seeded, tiny_pipeline

import edit
import generate
from diffusion import LatentUNet3D
from files.documents import FileError
from pipelines import MedVolumeEditPipeline, MedVolumePipeline, SamplingConfig, SamplingSettings, VolumeRequest
from pipelines.batch_generation import load_pipeline
from pipelines.storage.loading import check_weak

LABELS = labels_of((8, 8, 8))
DROPPED = {"mask": 0.1}


def weaker(seed: int = 5, **changes) -> LatentUNet3D:
    """A smaller U-Net for the latents, the masks and the objective of `tiny_pipeline`."""
    torch.manual_seed(seed)
    config = {"channels": (8, 8), "blocks": (1, 1), "attention": (False, False), "head_dim": 8, "num_labels": 3}
    unet = LatentUNet3D(**{**config, "mask_width": 4, **changes})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return unet.eval()


@pytest.fixture
def pipe():
    pipe = tiny_pipeline(condition_dropout=DROPPED)
    pipe.register_modules(unet_weak=weaker())
    return pipe


def sampled(pipe, **settings):
    return pipe(LABELS, generator=seeded(0), output_type="latent", **{"num_inference_steps": 1, **settings})


def latents(pipe, **settings) -> torch.Tensor:
    return sampled(pipe, **settings).volumes[0]


def test_a_step_is_the_formula_of_the_paper(pipe):
    """One Euler step from sigma 1 to 0 is linear in the prediction: so are the latents."""
    strong = latents(pipe)
    of_weak = tiny_pipeline(condition_dropout=DROPPED)
    of_weak.unet = pipe.unet_weak
    weak, free = latents(of_weak), latents(pipe, guidance_scale=2.0)
    assert (strong - weak).abs().max() > 1e-2
    torch.testing.assert_close(latents(pipe, autoguidance_scale=2.5), 2.5 * strong - 1.5 * weak, atol=1e-4, rtol=0)
    both = latents(pipe, autoguidance_scale=2.5, guidance_scale=2.0)
    torch.testing.assert_close(both, free + 1.5 * (strong - weak), atol=1e-4, rtol=0)
    by_name = latents(pipe, autoguidance_scale=2.5, guidance_scale={"mask": 2.0})
    torch.testing.assert_close(by_name, both, atol=1e-4, rtol=0)


def test_a_weaker_unet_that_is_not_asked_for_changes_no_bit(pipe):
    plain = tiny_pipeline(condition_dropout=DROPPED)
    assert pipe.model_hash == plain.model_hash and pipe.unet_weak_hash != pipe.unet_hash
    assert pipe.unet_weak_hash == _with_unet(pipe.unet_weak).unet_hash
    for settings in ({}, {"autoguidance_scale": 1.0}, {"guidance_scale": 2.0, "guidance_interval": (0, 1)}):
        guided = {name: value for name, value in settings.items() if name == "guidance_scale"}
        assert torch.equal(latents(pipe, **settings), latents(plain, **guided))
        record = sampled(pipe, **settings).provenance[0]
        assert not {"autoguidance_scale", "guidance_interval", "unet_weak"} & record.keys()
    assert not pipe.unet_weak.training and not plain.unet_weak


def _with_unet(unet):
    pipe = tiny_pipeline(condition_dropout=DROPPED)
    pipe.unet = unet
    return pipe


def test_records_name_guidance_its_interval_and_the_calls(pipe):
    settings = {"num_inference_steps": 10, "guidance_scale": 2.0, "autoguidance_scale": 1.5}
    record = sampled(pipe, **settings, guidance_interval=(0.2, 0.8)).provenance[0]
    assert record["guidance_interval"] == [0.2, 0.8] and record["autoguidance_scale"] == 1.5
    assert record["unet_weak"] == pipe.unet_weak_hash
    assert record["network_calls"] == 6 * 3 + 4  # of ten steps, those at 0.8 to 0.3 are guided
    assert record["settings_from"] == dict.fromkeys((*settings, "guidance_interval"), "call")
    with pytest.warns(UserWarning, match="guidance_interval acts on guidance, and there is none"):
        unguided = sampled(pipe, num_inference_steps=3, guidance_interval=(0.2, 0.8)).provenance[0]
    assert "guidance_interval" not in unguided and unguided["network_calls"] == 3


def test_an_edit_is_guided_in_its_steps(pipe):
    pipe = tiny_pipeline(condition_dropout=DROPPED, intensity=[{"kind": "window", "low": 0, "high": 300}])
    pipe.register_modules(unet_weak=weaker())
    image = pipe(LABELS, generator=seeded(0), output_type="np", num_inference_steps=1).volumes[0][0]
    out = editor_of(pipe)(
        mask=LABELS,
        image=image,
        strength=0.5,
        num_inference_steps=10,
        guidance_interval=(0.2, 0.8),
        autoguidance_scale=1.5,
        output_type="latent",
    )
    assert out.provenance[0]["network_calls"] == 3 * 2 + 2  # 0.5, 0.4 and 0.3 are guided


def test_the_weaker_unet_travels_with_the_folder(pipe, tmp_path):
    pipe.sampling_settings = SamplingSettings(4, 2.0, (0.25, 1.0), 1.5)
    expected = latents(pipe, num_inference_steps=None)
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "sampling.json").read_text()) == {
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "guidance_interval": [0.25, 1.0],
        "autoguidance_scale": 1.5,
    }
    for kind in (MedVolumePipeline, MedVolumeEditPipeline):
        loaded = kind.from_pretrained(tmp_path / "saved")
        assert loaded.sampling_settings == pipe.sampling_settings and loaded.unet_weak_hash == pipe.unet_weak_hash
    again = MedVolumePipeline.from_pipe(loaded)
    again.set_progress_bar_config(disable=True)
    components = {"vae", "unet", "scheduler", "unet_weak", "controlnet"}
    assert again.unet_weak is loaded.unet_weak and set(again.components) == components
    assert torch.equal(latents(again, num_inference_steps=None), expected)
    assert again.to(torch.float16).unet_weak.dtype == torch.float16
    half = MedVolumePipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.unet_weak.dtype == torch.bfloat16


def test_a_folder_without_one_is_loaded_and_may_get_one(pipe, tmp_path):
    tiny_pipeline(condition_dropout=DROPPED).save_pretrained(tmp_path / "plain")
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    for content in (index, {name: entry for name, entry in index.items() if name != "unet_weak"}):
        (tmp_path / "plain" / "model_index.json").write_text(json.dumps(content))
        loaded = MedVolumePipeline.from_pretrained(tmp_path / "plain")
        assert loaded.unet_weak is None and not (tmp_path / "plain" / "unet_weak").exists()
    with pytest.raises(ValueError, match="autoguidance_scale 2: the pipeline has no weaker U-Net; give it one with"):
        sampled(loaded, autoguidance_scale=2.0)
    given = MedVolumePipeline.from_pretrained(tmp_path / "plain", unet_weak=pipe.unet_weak)
    given.set_progress_bar_config(disable=True)
    pipe.unet_weak.save_pretrained(tmp_path / "weak")
    loaded.load_unet_weak(tmp_path / "weak")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded, autoguidance_scale=2.0), latents(given, autoguidance_scale=2.0))
    loaded.load_unet_weak(tmp_path / "plain")  # its own U-Net is no weaker, and guides nowhere
    torch.testing.assert_close(latents(loaded, autoguidance_scale=2.0), latents(loaded), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_labels": 2}, "unet_weak has num_labels 2, the pipeline's U-Net 3"),
        ({"objective": "epsilon"}, "unet_weak has objective 'epsilon', the pipeline's U-Net 'rectified_flow'"),
        ({"in_channels": 2, "out_channels": 2}, "unet_weak has in_channels 2"),
        ({"mask_stride": 2}, "unet_weak has mask_stride 2"),
        ({"numbers": {"age": {"mean": 1.0, "std": 1.0}}}, "unet_weak has numbers"),
    ],
)
def test_a_unet_of_another_kind_is_refused(tmp_path, changes, said):
    pipe, other = tiny_pipeline(condition_dropout=DROPPED), weaker(**changes)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=said):
        pipe.load_unet_weak(tmp_path / "other")
    with pytest.raises(ValueError, match=said):
        MedVolumePipeline(pipe.vae, pipe.unet, pipe.scheduler, pipe.data, other)
    with pytest.raises(ValueError, match="unet_weak is Linear; a LatentDenoiser is needed"):
        MedVolumePipeline(pipe.vae, pipe.unet, pipe.scheduler, pipe.data, torch.nn.Linear(1, 1))
    with pytest.raises(FileError, match="no U-Net there"):
        pipe.load_unet_weak(tmp_path)
    pipe.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="config.json is of AutoencoderKL3D, which is not a U-Net"):
        pipe.load_unet_weak(tmp_path / "vae")


def test_the_weaker_unet_has_the_type_and_takes_the_masks(pipe):
    with pytest.raises(ValueError, match=r"unet_weak is torch.float16, the pipeline's U-Net torch.float32; cast it"):
        MedVolumePipeline(pipe.vae, pipe.unet, pipe.scheduler, pipe.data, weaker().half())
    with pytest.raises(ValueError, match="unet_weak takes whole masks only, the pipeline's U-Net partial ones"):
        check_weak(weaker(partial_masks=0.1), weaker())
    for ours in (0.1, None):
        check_weak(weaker(partial_masks=ours), weaker(partial_masks=0.3))  # how often is no matter


def test_volumes_are_prepared_for_one_weaker_unet(pipe):
    sampling = SamplingConfig(1, autoguidance_scale=2.0)
    prepared = pipe.prepare([VolumeRequest(LABELS)], sampling)
    pipe.register_modules(unet_weak=weaker(seed=6))
    with pytest.raises(ValueError, match="prepared for another weaker U-Net"):
        pipe.generate(prepared, sampling, seeded(0))
    pipe.register_modules(unet_weak=None)
    with pytest.raises(ValueError, match="the pipeline has no weaker U-Net"):
        pipe.generate(prepared, sampling, seeded(0))


def test_a_weaker_unet_of_an_offloaded_pipeline_is_offloaded(pipe, tmp_path):
    pipe.unet_weak.save_pretrained(tmp_path)
    other = tiny_pipeline(condition_dropout=DROPPED)
    other.enable_model_cpu_offload(device="cpu")
    other.load_unet_weak(tmp_path)
    assert hasattr(other.unet_weak, "_hf_hook")
    assert torch.equal(latents(other, autoguidance_scale=2.0), latents(pipe, autoguidance_scale=2.0))
    other = tiny_pipeline(condition_dropout=DROPPED)
    cpu_offload(other.unet, torch.device("cpu"))
    with pytest.raises(ValueError, match="load_unet_weak: the pipeline's U-Net is offloaded"):
        other.load_unet_weak(tmp_path)


def test_a_weaker_unet_that_guides_nothing_is_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.unet_weak.save_pretrained(tmp_path / "weak")
    words = ["--pipeline", tmp_path / "pipe", "--output", tmp_path / "out", "--unet_weak", tmp_path / "weak"]
    with pytest.warns(UserWarning, match="--unet_weak .*autoguidance_scale is 1, so it guides nothing"):
        load_pipeline(generate.parse([str(word) for word in words]), None)


def test_settings_that_do_not_fit_are_refused(pipe, tmp_path):
    plain = tiny_pipeline(condition_dropout=DROPPED)
    plain.save_pretrained(tmp_path)
    for content, said in (
        ({"autoguidance_scale": 2}, "autoguidance_scale 2: the pipeline has no weaker U-Net"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval must be two noise levels"),
        ({"guidance_interval": [0.1]}, "guidance_interval: got \\[0.1\\], expected a list of 2"),
        ({"guidance_interval": [0.1, 2]}, "guidance_interval\\[1\\]: got 2, expected a number, from 0 to 1"),
    ):
        (tmp_path / "sampling.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"sampling.json: {said}.*; correct it, or remove the file"):
            MedVolumePipeline.from_pretrained(tmp_path)
    plain.sampling_settings = SamplingSettings(autoguidance_scale=2.0)
    with pytest.raises(ValueError, match="no weaker U-Net"):
        plain.save_pretrained(tmp_path / "new")


def test_the_command_guides_by_a_folder(pipe, tmp_path):
    tiny_pipeline(condition_dropout=DROPPED).save_pretrained(tmp_path / "pipe")
    pipe.unet_weak.save_pretrained(tmp_path / "weak")
    nib.save(mask_image((8, 8, 8)), tmp_path / "a.nii.gz")
    words = ["--pipeline", tmp_path / "pipe", "--masks", tmp_path / "a.nii.gz", "--output", tmp_path / "out"]
    words += ["--steps", 5, "--unet_weak", tmp_path / "weak", "--autoguidance_scale", 1.5]
    words += ["--guidance_scale", 2, "--guidance_interval", 0.3, 0.7]
    generate.main([str(word) for word in words])
    written = json.loads((tmp_path / "out" / "a_000.json").read_text())
    assert written["guidance_interval"] == [0.3, 0.7] and written["autoguidance_scale"] == 1.5
    assert written["unet_weak"] == pipe.unet_weak_hash and written["network_calls"] == 2 * 3 + 3
    [row] = csv.DictReader((tmp_path / "out" / "manifest.csv").open())
    assert row["unet_weak"] == pipe.unet_weak_hash
    assert (row["guidance_interval"], row["autoguidance_scale"]) == ("0.3 0.7", "1.5")
    generate.main([str(word) for word in words])  # finished
    with pytest.raises(ValueError, match="was generated with another guidance_interval$"):
        generate.main([*map(str, words[:-2]), "0.3", "0.8"])


def test_the_commands_parse_an_interval(capsys):
    words = ["--pipeline", "p", "--output", "o", "--guidance_interval"]
    for command, more in ((generate, []), (edit, ["--image", "i.nii"])):
        sampling = command.parse([*more, *words, "0.2", "0.8", "--autoguidance_scale", "2"]).sampling
        assert (sampling.guidance_interval, sampling.autoguidance_scale) == ((0.2, 0.8), 2.0)
        with pytest.raises(ValueError, match="guidance_interval must be two noise levels"):
            command.parse([*more, *words, "0.8", "0.2"])
        with pytest.raises(SystemExit):
            command.parse([*more, *words, "0.2", "1.8"])
        assert "--guidance_interval: got 1.8, expected a number, from 0 to 1" in capsys.readouterr().err
