"""The best weights by validation, the early stop, the comparison of generated volumes; all of them exact on resume."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from line import LineStep, line_config, line_loop
from safetensors.torch import load_file
from short_runs import Interrupted, run

import train_ldm
import train_vae
from autoencoder import AutoencoderKL3D
from training import list_checkpoints
from training.encoder_distance import EncoderDistance, box
from training.engine.checkpoints import digest_files

ARGS = ["--loop.max_steps=12", "--loop.validate_every=2", "--loop.checkpoint_every=3", "--loop.keep_checkpoints=0"]
ARGS += ["--loop.previews=0", "--loop.trackers=[]"]
ERRORS = {2: 6.75, 4: 3.75, 6: 4.5, 8: 5.25, 10: 3.0, 12: 6.0}  # by step; thirds of them are exact


def loop_of(tmp_path, *args, errors=ERRORS, fail_at=None):
    """A run whose validation error is as given."""
    AcceleratorState._reset_state(reset_partial_state=True)
    loop, step = line_loop(line_config(tmp_path, *ARGS, *args))

    def validate(item, generator):
        if loop.state.step == fail_at:
            raise Interrupted
        return {"error": errors[loop.state.step]}

    step.validate = validate
    return loop


def best_of(folder):
    described = json.loads((folder / "best/best.json").read_text())
    return described, load_file(folder / "best/best.safetensors")["weight"].item()


def state_of(folder, step):
    return json.loads((folder / f"checkpoints/step_{step:06d}/state.json").read_text())


def averages(folder):
    return {int(p.name[5:]): load_file(p / "line_ema.safetensors")["weight"] for p in list_checkpoints(folder)}


def test_the_best_averaged_weights_are_kept(tmp_path):
    loop_of(tmp_path, "--loop.checkpoint_every=1").run()
    described, weight = best_of(tmp_path / "run")
    assert described == {"metric": "error", "step": 10, "value": 3.0}
    kept = averages(tmp_path / "run/checkpoints")
    assert weight == kept[10].item() != kept[12].item()
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["error"] == 6.0 and found["best"] == described and found["export"] == "last"
    assert [state_of(tmp_path / "run", step)["best_step"] for step in (1, 2, 3, 4, 9, 10, 12)] == [
        0,
        2,
        2,
        4,
        4,
        10,
        10,
    ]
    assert [state_of(tmp_path / "run", step)["stale"] for step in (2, 4, 6, 8, 10, 11)] == [0, 0, 1, 2, 0, 0]


def test_more_is_better_where_the_step_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(LineStep, "metrics", {"error": True})
    loop_of(tmp_path).run()
    assert best_of(tmp_path / "run")[0] == {"metric": "error", "step": 2, "value": 6.75}


def test_values_that_are_not_finite_are_never_best(tmp_path):
    loop_of(tmp_path, errors=dict.fromkeys(ERRORS, float("nan"))).run()
    assert not (tmp_path / "run/best").exists() and state_of(tmp_path / "run", 12)["best_value"] is None
    with pytest.raises(RuntimeError, match="loop.export best: error was not finite in any validation"):
        loop_of(tmp_path, "--loop.export=best", "--resume=latest", errors={12: float("nan")}).run()


def test_without_validation_nothing_is_kept(tmp_path):
    loop_of(tmp_path, "--loop.validate_every=0").run()
    assert not (tmp_path / "run/best").exists()
    assert not list((tmp_path / "run/checkpoints").rglob("best*"))
    assert "best" not in json.loads((tmp_path / "run/metrics.json").read_text())


@pytest.mark.parametrize("fail_at", [6, 10, 12])
def test_a_resumed_run_has_the_best_of_an_uninterrupted_one(tmp_path, fail_at):
    loop_of(tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        loop_of(tmp_path / "parts", fail_at=fail_at).run()
    loop_of(tmp_path / "parts", "--resume=latest").run()
    whole, parts = (tmp_path / name / "run" for name in ("whole", "parts"))
    assert best_of(parts) == best_of(whole)
    for step in (3, 6, 9, 12):
        assert state_of(parts, step) == state_of(whole, step)
        folder = f"checkpoints/step_{step:06d}/best.safetensors"
        assert (parts / folder).read_bytes() == (whole / folder).read_bytes()


def test_a_resume_forgets_the_best_of_later_steps(tmp_path):
    """Of steps that are repeated, perhaps with another result."""
    loop_of(tmp_path).run()
    kept = averages(tmp_path / "run/checkpoints")
    worse = ERRORS | {10: 7.5}
    loop_of(tmp_path, f"--resume={tmp_path / 'run/checkpoints/step_000006'}", errors=worse).run()
    described, weight = best_of(tmp_path / "run")
    assert described == {"metric": "error", "step": 4, "value": 3.75}
    assert weight == load_file(tmp_path / "run/checkpoints/step_000006/best.safetensors")["weight"].item()
    assert weight not in (kept[6].item(), kept[12].item())


def test_a_validation_that_was_cut_short_is_made_up_for(tmp_path):
    """By the run that resumes from the checkpoint of that step."""
    loop_of(tmp_path / "whole").run()
    loop = loop_of(tmp_path / "parts")

    def interrupted(item, generator):
        if loop.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"error": ERRORS[loop.state.step]}

    loop.step.validate = interrupted
    with pytest.raises(SystemExit):
        loop.run()
    assert state_of(tmp_path / "parts/run", 4)["validated"] == 2
    loop_of(tmp_path / "parts", "--resume=latest").run()
    assert state_of(tmp_path / "parts/run", 12) == state_of(tmp_path / "whole/run", 12)


def test_a_damaged_best_file_makes_a_checkpoint_damaged(tmp_path, caplog):
    loop_of(tmp_path).run()
    (tmp_path / "run/checkpoints/step_000012/best.safetensors").unlink()
    assert loop_of(tmp_path, "--resume=latest").state.step == 9
    assert "best.safetensors: differs from what was written" in caplog.text


@pytest.mark.parametrize("value", [None, "low"])
def test_a_state_that_does_not_fit_its_best_file_is_damaged(tmp_path, caplog, value):
    """Also where the digests are those of the damage."""
    loop_of(tmp_path).run()
    checkpoint = tmp_path / "run/checkpoints/step_000012"
    (checkpoint / "state.json").write_text(json.dumps(state_of(tmp_path / "run", 12) | {"best_value": value}))
    (checkpoint / "digests.json").write_text(json.dumps(digest_files(checkpoint)))
    assert loop_of(tmp_path, "--resume=latest").state.step == 9
    assert "state.json and best.safetensors do not fit" in caplog.text


# Early stop


def test_a_run_ends_early_when_validations_do_not_improve(tmp_path, caplog):
    with caplog.at_level("INFO", logger="training"):
        metrics = loop_of(tmp_path, "--loop.patience=2").run()
    said = (
        "stopped early at step 8, because error did not improve in 2 validations in a row: the best was 3.75 at step 4"
    )
    assert said in caplog.text
    assert metrics == {"error": 5.25} and caplog.text.count("step 8  validation") == 1  # not repeated at the end
    assert list_checkpoints(tmp_path / "run/checkpoints")[-1].name == "step_000008"
    caplog.clear()
    before = (tmp_path / "run/checkpoints/step_000008/state.json").stat()
    with caplog.at_level("INFO", logger="training"):
        again = loop_of(tmp_path, "--loop.patience=2", "--resume=latest").run()
    assert again == metrics and "stopped early at step 8" in caplog.text and "raise loop.patience" in caplog.text
    assert (tmp_path / "run/checkpoints/step_000008/state.json").stat() == before
    loop_of(tmp_path, "--loop.patience=3", "--resume=latest").run()
    assert state_of(tmp_path / "run", 12)["step"] == 12 and best_of(tmp_path / "run")[0]["step"] == 10


def test_small_changes_do_not_count_as_better(tmp_path):
    loop_of(tmp_path, "--loop.patience=3", "--loop.min_delta=1.0").run()
    assert list_checkpoints(tmp_path / "run/checkpoints")[-1].name == "step_000010"
    assert best_of(tmp_path / "run")[0]["step"] == 4


@pytest.mark.parametrize("fail_at", [4, 8])
def test_patience_is_part_of_the_state(tmp_path, fail_at):
    args = ["--loop.patience=2"]
    loop_of(tmp_path / "whole", *args).run()
    with pytest.raises(Interrupted):
        loop_of(tmp_path / "parts", *args, fail_at=fail_at).run()
    loop_of(tmp_path / "parts", *args, "--resume=latest").run()
    assert state_of(tmp_path / "parts/run", 8) == state_of(tmp_path / "whole/run", 8)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--loop.patience=2", "--loop.validate_every=0"], "loop.patience 2: nothing is validated during the run"),
        (["--loop.export=best", "--loop.validate_every=0"], "loop.export best: nothing is validated during the run"),
        (["--loop.best_by=psnr"], "loop.best_by: psnr is not measured; choose from error"),
        (["--loop.sample_every=2"], "loop.sample_every: this model generates no volumes; set it to 0"),
    ],
)
def test_what_a_run_does_not_measure_is_refused(tmp_path, args, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        loop_of(tmp_path, *args)


# What a run leaves


def test_an_autoencoder_leaves_the_best_weights_if_asked_to(tmp_path, monkeypatch):
    """A finished run writes the other ones without training again."""
    from training import VaeTrainingStep

    original, seen = VaeTrainingStep.validate, []

    def validate(self, item, generator):
        seen.append(self.vae.updates)
        return original(self, item, generator) | {"psnr": {4: 30.0, 8: 20.0, 9: 10.0}[self.vae.updates]}

    monkeypatch.setattr(VaeTrainingStep, "validate", validate)
    run(train_vae, tmp_path / "run", "--loop.checkpoint_every=1")
    weights = "vae/diffusion_pytorch_model.safetensors"
    last, statistics = load_file(tmp_path / "run" / weights), (tmp_path / "run/vae/config.json").read_text()
    run(train_vae, tmp_path / "run", "--loop.checkpoint_every=1", "--resume=latest", "--loop.export=best")
    assert seen == [4, 8, 9, 9]
    best = load_file(tmp_path / "run" / weights)
    averages = [load_file(tmp_path / f"run/checkpoints/step_00000{step}/vae_ema.safetensors") for step in (4, 9)]
    for found, expected in zip((best, last), averages, strict=True):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert (tmp_path / "run/vae/config.json").read_text() != statistics  # the latents of these weights were measured
    assert json.loads((tmp_path / "run/metrics.json").read_text())["export"] == "best"
    assert AutoencoderKL3D.from_pretrained(tmp_path / "run/vae")


# Generated volumes

SAMPLED = ["--data.phantom={count: 12, shape: [12, 12, 12]}", "--data.validation_fraction=0.4", "--loop.sample_every=3"]
SAMPLED += ["--loop.sample_volumes=4", "--loop.best_by=kernel_distance", "--loop.max_steps=7"]


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        one["step"]: (one["kernel_distance"], one["kernel_distance/floor"]) for one in lines if "kernel_distance" in one
    }


def test_generated_volumes_are_compared_with_held_out_ones(tmp_path, vae_folder, monkeypatch):
    """At its own steps, from the same noise, beside a floor that does not move; the losses are those of a run without;
    a resumed run has the same best."""
    args = [f"--vae={vae_folder}", *SAMPLED]
    plain = run(train_ldm, tmp_path / "plain", *args, "--loop.sample_every=0", "--loop.best_by=loss")
    metrics = run(train_ldm, tmp_path / "whole", *args)
    found = figures(tmp_path / "whole")
    assert list(found) == [3, 6, 7]
    assert len({floor for _, floor in found.values()}) == 1 and len({distance for distance, _ in found.values()}) == 3
    assert metrics == plain | {"kernel_distance": found[7][0], "kernel_distance/floor": found[7][1]}
    unet = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "plain" / unet).read_bytes() == (tmp_path / "whole" / unet).read_bytes()
    best = json.loads((tmp_path / "whole/best/best.json").read_text())
    assert best["metric"] == "kernel_distance" and best["value"] == min(distance for distance, _ in found.values())
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step_000006")
    shutil.rmtree(tmp_path / "parts/checkpoints/step_000007")
    run(train_ldm, tmp_path / "parts", *args, "--resume=latest")
    assert figures(tmp_path / "parts") == found
    assert json.loads((tmp_path / "parts/best/best.json").read_text()) == best
    names = [f"checkpoints/step_00000{step}/state.json" for step in (6, 7)]
    assert all((tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text() for name in names)


def test_too_few_volumes_to_compare_are_refused(tmp_path, vae_folder):
    with pytest.raises(
        ValueError, match="11 training volumes and 1 held-out ones are too few to compare; use 4 or more"
    ):
        run(train_ldm, tmp_path / "run", f"--vae={vae_folder}", *SAMPLED, "--data.validation_fraction=0.1")
    with pytest.raises(ValueError, match="loop.best_by: kernel_distance is not measured; it needs loop.sample_every"):
        run(train_ldm, tmp_path / "run", f"--vae={vae_folder}", *SAMPLED, "--loop.sample_every=0")


class Volumes(list):
    """Padded volumes of noise around a level, as `PaddedVolumes` has them."""

    def __init__(self, levels, seed=0):
        random = torch.Generator().manual_seed(seed)
        fov = torch.zeros(1, 12, 12, 12, dtype=torch.bool)
        fov[:, 1:11, :, 2:12] = True
        made = (level + 0.1 * torch.randn(1, 12, 12, 12, generator=random) for level in levels)
        super().__init__({"image": torch.where(fov, image, torch.tensor(-1.0)), "fov": fov} for image in made)


def test_the_distance_of_real_volumes_is_near_its_floor(vae_folder):
    """It grows with the difference; what is generated in the padding does not count."""
    levels = np.linspace(-0.5, 0.5, 64)
    training, held_out = Volumes(levels[::2], seed=1), Volumes(levels[1::2], seed=2)
    distance = EncoderDistance(AutoencoderKL3D.from_pretrained(vae_folder), training)
    found = []
    for shift in (0.0, 0.1, 0.3):
        like_real = Volumes(levels[1::2] + shift, seed=3)
        painted = [torch.where(one["fov"], one["image"], torch.tensor(1.0)) for one in like_real]
        pairs = list(zip(like_real, painted, held_out, strict=True))
        rows = [distance.row(one["image"], item, number, 32) for number, (one, _, item) in enumerate(pairs)]
        assert all(
            np.array_equal(row, distance.row(other, item, number, 32))
            for number, (row, (_, other, item)) in enumerate(zip(rows, pairs, strict=True))
        )
        found.append(distance.compare(rows))
    assert len({one["kernel_distance/floor"] for one in found}) == 1
    floor, values = abs(found[0]["kernel_distance/floor"]), [one["kernel_distance"] for one in found]
    assert abs(values[0]) < 5 * floor + 0.2 and values[0] < values[1] < values[2] and values[2] > 10 * floor
    rows[3][0] = np.nan  # one generated volume diverged
    assert np.isnan(distance.compare(rows)["kernel_distance"])


def test_what_is_outside_the_field_of_view_does_not_count(vae_folder):
    """Not in a corner of the box either, which a volume on another grid does not show."""
    volumes = Volumes([0.0, 0.2])
    fov = volumes[0]["fov"].clone()
    fov[:, :6, :6] = False
    item = {"image": torch.where(fov, volumes[0]["image"], torch.tensor(-1.0)), "fov": fov}
    distance = EncoderDistance(AutoencoderKL3D.from_pretrained(vae_folder), volumes)
    painted = torch.where(fov, item["image"], torch.tensor(1.0))
    rows = [distance.row(one, item, 0, 2) for one in (item["image"], painted)]
    assert np.array_equal(*rows) and np.array_equal(rows[1][0], rows[1][1])


def test_the_box_is_what_is_not_padding():
    assert box(Volumes([0.0])[0]["fov"]) == (slice(1, 11), slice(0, 12), slice(2, 12))
