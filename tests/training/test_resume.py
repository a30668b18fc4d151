"""An interrupted and resumed run equals the uninterrupted one, bit for bit; what a resume refuses or reports."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_runs import STEPS, Interrupted, everything, run

import train_ldm
import train_vae
from autoencoder import AutoencoderKL3D
from training import LdmTrainingStep, VaeTrainingStep
from training.engine.checkpoints import digest_files

VQGAN = [
    "--model={class: autoencoder.VQGAN3D, channels: [4, 12], encoder_blocks: [1, 1], decoder_blocks: [1, 1], "
    "num_codes: 16}",
    "--adversarial={start_step: 2, warmup_steps: 3, channels: 4, layers: 1}",
]


@pytest.mark.parametrize(
    "name,workers", [("vae", 0), ("vae", 2), ("vqgan", 0), ("perceptual", 0), ("ldm", 0), ("ldm", 2)]
)
def test_resumed_equals_uninterrupted(name, workers, tmp_path, vae_folder, monkeypatch):
    script, step_class = (train_ldm, LdmTrainingStep) if name == "ldm" else (train_vae, VaeTrainingStep)
    perceptual = [f"--perceptual={{network: {vae_folder}}}"]
    own = {"vae": [], "vqgan": VQGAN, "perceptual": perceptual, "ldm": [f"--vae={vae_folder}"]}[name]
    args = [f"--loop.workers={workers}", *own]
    metrics = run(script, tmp_path / "whole", *args)

    original, calls = step_class.__call__, []

    def interrupted_call(self, batch, generators):
        calls.append(1)
        if len(calls) == 2 * 4 + 2:  # the second half of step 5; 5 training volumes, so in the middle of an epoch
            raise Interrupted
        return original(self, batch, generators)

    monkeypatch.setattr(step_class, "__call__", interrupted_call)
    with pytest.raises(Interrupted):
        run(script, tmp_path / "parts", *args)
    monkeypatch.setattr(step_class, "__call__", original)
    checkpoints = tmp_path / "parts/checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step_000003"]
    torch.manual_seed(99)  # a new process starts from another random state
    resumed = run(script, tmp_path / "parts", *args, "--resume=latest")

    last = f"step_{STEPS:06d}"
    expected, got = everything(tmp_path / "whole/checkpoints" / last), everything(checkpoints / last)
    assert expected.keys() == got.keys() and len(got) > 50
    assert [k for k in expected if not torch.equal(expected[k], got[k])] == []
    states = [json.loads((tmp_path / p / "checkpoints" / last / "state.json").read_text()) for p in ("whole", "parts")]
    if name == "vqgan":
        assert {"optimizer_1:0:exp_avg"} <= got.keys() and any("codebook.counts" in key for key in got)
    assert states[0] == states[1] and states[0]["samples"] == STEPS * 2 * 2
    assert resumed == metrics
    final = (
        "pipeline/unet/diffusion_pytorch_model.safetensors"
        if name == "ldm"
        else "vae/diffusion_pytorch_model.safetensors"
    )
    assert (tmp_path / "whole" / final).read_bytes() == (tmp_path / "parts" / final).read_bytes()


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run of three steps."""
    run(train_vae, tmp_path / "run", "--loop.max_steps=3")
    return tmp_path / "run"


def test_another_run_is_not_overwritten(finished):
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume latest"):
        run(train_vae, finished)


def test_a_changed_config_is_refused_with_the_difference(finished, caplog):
    """It is accepted with an option."""
    changed = ["--loop.max_steps=4", "--optimizer.learning_rate=0.5", "--resume=latest"]
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.5\nUndo these.*--accept_changes true"):
        run(train_vae, finished, *changed)
    with caplog.at_level("WARNING", logger="training"):
        run(train_vae, finished, *changed, "--accept_changes=true")
    changes = [r.message for r in caplog.records if "changed since" in r.message]
    assert [c.split(": ", 1)[1] for c in changes] == ["optimizer.learning_rate: 0.001 -> 0.5", "loop.max_steps: 3 -> 4"]


def test_an_adversary_cannot_join_a_run(finished):
    with pytest.raises(ValueError, match="holds no discriminator.*resume with the config"):
        run(train_vae, finished, VQGAN[1], "--loop.max_steps=4", "--resume=latest", "--accept_changes=true")


def test_resume_with_nothing_there_starts_anew(tmp_path, caplog):
    with caplog.at_level("INFO", logger="training"):
        run(train_vae, tmp_path / "new", "--loop.max_steps=1", "--resume=latest")
    assert "nothing to resume" in caplog.text


def test_checkpoints_of_other_runs_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="only those of this run.*are read.*--init_from"):
        run(train_vae, tmp_path / "other", f"--resume={finished / 'checkpoints/step_000003'}")
    with pytest.raises(ValueError, match="there is no checkpoint; this run has \\['step_000003'\\]"):
        run(train_vae, finished, "--resume=step_000007")


def test_a_half_written_checkpoint_is_not_seen(finished):
    half = finished / "checkpoints/.unfinished-1/new/step_000004"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    (half.parents[1] / "lock").touch()  # of a process that was killed
    run(train_vae, finished, "--loop.max_steps=4", "--resume=latest")
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step_000003", "step_000004"]


def test_a_random_state_that_was_not_restored_is_noticed(finished):
    """Also where the digests are those of the damage."""
    checkpoint = finished / "checkpoints/step_000003"
    (checkpoint / "random_states_0.pkl").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="random_states_0.pkl: differs from what was written"):
        run(train_vae, finished, "--loop.max_steps=4", "--resume=latest")
    (checkpoint / "digests.json").write_text(json.dumps(digest_files(checkpoint)))
    with pytest.raises(ValueError, match="random state could not be restored"):
        run(train_vae, finished, "--loop.max_steps=4", "--resume=latest")


def test_fine_tuning_on_another_number_of_labels(tmp_path, vae_folder, caplog):
    run(train_ldm, tmp_path / "first", f"--vae={vae_folder}", "--loop.max_steps=2")
    unet = tmp_path / "first/pipeline/unet"
    labels = "--data.label_names={0: background, 1: body, 2: organ, 3: lesion, 4: implant}"
    with caplog.at_level("INFO", logger="training"):
        run(train_ldm, tmp_path / "second", f"--vae={vae_folder}", "--loop.max_steps=1", labels, f"--init_from={unet}")
    assert "layers that start fresh: ['mask_embedding.table']" in caplog.text


@pytest.fixture
def traced(monkeypatch) -> list[type]:
    """torch.compile without code generation, which takes a minute; the classes that were compiled."""
    compiled, original = [], torch.nn.Module.compile

    def compile_in_place(module, **options):
        compiled.append(type(module))
        original(module, **options, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    monkeypatch.setattr("training.engine.run.check_compiler", lambda device: None)
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [pytest.param("vae", marks=pytest.mark.slow), "ldm"])
def test_compiled_equals_eager_and_leaves_the_same_names(name, tmp_path, vae_folder, traced):
    """A run that is compiled for its first half only, on crops, checkpointed and not, ends as one that never was."""
    script = train_vae if name == "vae" else train_ldm
    args = ["--loop.max_steps=4", "--loop.checkpoint_every=2", "--optimizer.gradient_accumulation=1"]
    args += [] if name == "vae" else [f"--vae={vae_folder}", "--gradient_checkpointing=true", "--cache.shift=false"]
    run(script, tmp_path / "eager", *args)
    assert not traced
    run(script, tmp_path / "compiled", *args, "--loop.compile=true")
    assert [c.__name__ for c in traced] == ["AutoencoderKL3D" if name == "vae" else "LatentUNet3D"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    shutil.rmtree(tmp_path / "compiled/checkpoints/step_000004")
    run(script, tmp_path / "compiled", *args, "--resume=latest")
    expected, got = (everything(tmp_path / kind / "checkpoints/step_000004") for kind in ("eager", "compiled"))
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    final = "vae" if name == "vae" else "pipeline/unet"
    weights = [
        load_file(tmp_path / kind / final / "diffusion_pytorch_model.safetensors") for kind in ("eager", "compiled")
    ]
    assert weights[0].keys() == weights[1].keys()


def test_bf16(tmp_path):
    """Trains as float32 does, but for rounding, and keeps its weights in float32."""
    half, whole = (
        run(train_vae, tmp_path / name, "--loop.max_steps=3", f"--loop.mixed_precision={name}")
        for name in ("bf16", "no")
    )
    assert half["psnr"] == pytest.approx(whole["psnr"], abs=0.1) and half["psnr"] != whole["psnr"]
    weights = load_file(tmp_path / "bf16/vae/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_the_model_section_must_agree_with_the_autoencoder(tmp_path, vae_folder):
    with pytest.raises(ValueError, match="model.in_channels is 8, but autoencoder and data make it 4"):
        run(train_ldm, tmp_path / "run", f"--vae={vae_folder}", "--model.in_channels=8")


def test_an_autoencoder_without_statistics_is_refused(tmp_path):
    AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="no latents_mean and latents_std"):
        run(train_ldm, tmp_path / "run", f"--vae={tmp_path / 'vae'}")


def test_a_frozen_encoder_keeps_its_latents(tmp_path, vae_folder):
    model = (
        "--model={class: autoencoder.AutoencoderKL3D, channels: [4, 8], encoder_blocks: [1, 1], decoder_blocks: [1, 1]}"
    )
    run(train_vae, tmp_path, model, f"--init_from={vae_folder}", "--freeze_encoder=true", "--loop.max_steps=3")
    before, after = (AutoencoderKL3D.from_pretrained(folder) for folder in (vae_folder, tmp_path / "vae"))
    changed = {
        key.split(".")[0]
        for key, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[key])
    }
    assert changed == {"decoder"}
    assert after.config["latents_mean"] == [0.1] * 4 and after.config["latents_std"] == [0.5] * 4
    with pytest.raises(ValueError, match="freeze_encoder needs --init_from"):
        run(train_vae, tmp_path / "other", model, "--freeze_encoder=true")
