"""What befalls long runs: signals, full disks, damaged checkpoints, other data, losses that go wrong. Each ends in a
message with a remedy, and nothing that was finished is lost."""

import errno
import json
import os
import random
import resource
import shlex
import signal
import threading

import pytest
import torch
from accelerate.state import AcceleratorState
from line import LineStep, line_config, line_loop
from safetensors.torch import load_file, save_file
from short_runs import COMMON, LDM, VAE
from vae_steps import batch, generators, make_step
from waiting import when

import train_ldm
import train_vae
from autoencoder import VQGAN3D, AutoencoderKL3D
from benchmarks import forked, survival
from diffusion import build_latent_cache
from files.atomic import remove_leftovers
from files.locks import only_writer
from files.writable import explain_disk_full
from training import LoopConfig, list_checkpoints, make_accelerator
from training.engine.loop import content_changes
from training.engine.loss_spikes import SpikeWatch
from training.engine.output import save_model
from training.splits import digests
from volumes import DataConfig, VolumeDataset, VolumeError, load_cases, make_phantom, write_volume


def weights(run):
    return load_file(list_checkpoints(run / "checkpoints")[-1] / "model.safetensors")["weight"].clone()


@pytest.fixture
def run(tmp_path):
    """A run of six steps with three checkpoints; a function that goes on with it to a step."""
    line_loop(line_config(tmp_path, "--loop.max_steps=6", "--loop.checkpoint_every=2", "--loop.keep_checkpoints=5"))[
        0
    ].run()
    AcceleratorState._reset_state(reset_partial_state=True)

    def go_on(*args):
        config = line_config(tmp_path, "--loop.max_steps=6", "--loop.checkpoint_every=2", "--resume=latest", *args)
        loop, _ = line_loop(config)
        loop.run()
        AcceleratorState._reset_state(reset_partial_state=True)

    return tmp_path / "run", go_on


# Signals


@pytest.fixture
def interrupts():
    """Of a test run in the background of a shell, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_exits(tmp_path, monkeypatch, caplog, capfd, interrupts, number):
    line_loop(line_config(tmp_path / "whole", "--loop.max_steps=9"))[0].run()
    AcceleratorState._reset_state(reset_partial_state=True)
    loop, _ = line_loop(line_config(tmp_path, "--loop.max_steps=9"))
    original = LineStep.__call__

    def terminated(self, batch, generators):
        if self.calls == 4:
            os.kill(os.getpid(), number)
        return original(self, batch, generators)

    monkeypatch.setattr(LineStep, "__call__", terminated)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, caplog.at_level("WARNING", logger="training"):
        loop.run()
    assert end.value.code == 128 + number and signal.getsignal(number) is before
    assert f"{number.name}: wrote" in caplog.text and "--resume latest continues" in caplog.text
    assert ": finishing step 5, then saving" in capfd.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_000005"]
    monkeypatch.setattr(LineStep, "__call__", original)
    AcceleratorState._reset_state(reset_partial_state=True)
    line_loop(line_config(tmp_path, "--loop.max_steps=9", "--resume=latest"))[0].run()
    assert torch.equal(weights(tmp_path / "run"), weights(tmp_path / "whole/run"))


def test_an_interrupt_in_a_validation_cuts_it_short_and_saves(tmp_path, monkeypatch, caplog, capfd, interrupts):
    loop, _ = line_loop(line_config(tmp_path, "--loop.max_steps=9", "--loop.validate_every=4"))
    judged, original = [], LineStep.validate

    def interrupted(self, item, generator):
        judged.append(item)
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, item, generator)

    monkeypatch.setattr(LineStep, "validate", interrupted)
    with pytest.raises(SystemExit) as end, caplog.at_level("WARNING", logger="training"):
        loop.run()
    assert end.value.code == 130 and len(judged) == 1  # of three
    assert "finishing the validation at step 4, then saving" in capfd.readouterr().err
    assert "step 4: the validation was cut short" in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_000004"]


def test_an_interrupt_after_the_last_step_ends_at_once(tmp_path, monkeypatch, interrupts):
    """A resumed run finishes."""
    loop, step = line_loop(line_config(tmp_path, "--loop.max_steps=4"))
    monkeypatch.setattr(LineStep, "validate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        loop.run()
    assert end.value.code == 130 and not (tmp_path / "run/metrics.json").exists()
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    loop, step = line_loop(line_config(tmp_path, "--loop.max_steps=4", "--resume=latest"))
    assert "error" in loop.run() and step.calls == 0


def test_an_interrupted_training_resumes_bit_for_bit(tmp_path):
    """The command that it prints resumes it."""
    common = [*COMMON, *VAE, "--loop.max_steps=60", "--loop.checkpoint_every=0", "--loop.validate_every=0"]
    forked.run("train_vae", [*common, f"--output={tmp_path / 'whole'}"], tmp_path / "whole.txt")
    log, lines = tmp_path / "log.txt", tmp_path / "losses.jsonl"
    process = forked.start("train_vae", [*common, f"--output={tmp_path / 'run'}"], log, losses=lines)
    when(lines.is_file, [process])
    os.kill(process.pid, signal.SIGINT)
    assert forked.ended(process) == 130
    said = log.read_text()
    assert "Ctrl-C: finishing step" in said and "SIGINT: wrote" in said and "Traceback" not in said
    (checkpoint,) = list_checkpoints(tmp_path / "run/checkpoints")
    assert 0 < json.loads((checkpoint / "state.json").read_text())["step"] < 60
    command = shlex.split(said.partition("continue with: ")[2].splitlines()[0])
    assert command[0] == "python" and command[1].endswith("train_vae.py") and command[-2:] == ["--resume", "latest"]
    forked.run("train_vae", command[2:], tmp_path / "again.txt")
    assert "resumed from" in (tmp_path / "again.txt").read_text()
    ours, theirs = (load_file(tmp_path / name / "vae/diffusion_pytorch_model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_interrupt_while_encoding_keeps_finished_latents(tmp_path, monkeypatch, interrupts, capfd):
    """There is no step to finish yet: it ends at once, and the same command encodes the others alone."""
    torch.manual_seed(0)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    vae.save_pretrained(tmp_path / "vae")
    args = [*COMMON, *LDM, f"--vae={tmp_path / 'vae'}", f"--output={tmp_path / 'run'}", "--loop.max_steps=1"]
    encode, encoded = AutoencoderKL3D.encode, []

    def counted(self, *given, **options):
        encoded.append(1)
        if len(encoded) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, *given, **options)

    monkeypatch.setattr(AutoencoderKL3D, "encode", counted)
    with pytest.raises(SystemExit) as end:
        train_ldm.main(args)
    assert end.value.code == 130 and len(encoded) == 3
    said = capfd.readouterr().err
    assert "Ctrl-C: ending" in said and "continue with: python train_ldm.py" in said
    assert len(list((tmp_path / "run/latents").rglob("*.safetensors"))) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    train_ldm.main([*args, "--resume=latest"])
    assert (
        len(list((tmp_path / "run/latents").rglob("*.safetensors"))) == 2 * 5 + 1
    )  # 5 volumes of 6 are trained on, one is held out
    assert (tmp_path / "run/pipeline").is_dir()


def test_a_loop_in_a_thread_runs_without_signals(tmp_path):
    loop, ended = line_loop(line_config(tmp_path, "--loop.max_steps=2", "--loop.previews=0"))[0], []
    thread = threading.Thread(target=lambda: ended.append(loop.run()))
    thread.start()
    thread.join()
    assert len(ended) == 1


# Checkpoints


@pytest.mark.parametrize("name", ["optimizer.bin", "line_ema.safetensors", "model.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_passed_over_and_named(run, name, caplog):
    folder, go_on = run
    expected, last = weights(folder), folder / "checkpoints/step_000006"
    os.truncate(last / name, (last / name).stat().st_size // 2)
    with caplog.at_level("WARNING", logger="training"):
        go_on()
    assert (
        f"step_000006: {name}: differs from what was written" in caplog.text
        and "resumes from step_000004" in caplog.text
    )
    assert torch.equal(weights(folder), expected)
    assert (folder / "checkpoints/aside_step_000006").is_dir()


def test_a_flipped_bit_is_found(run, caplog):
    folder, go_on = run
    path = folder / "checkpoints/step_000006/optimizer.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    go_on()
    assert "optimizer.bin: differs from what was written" in caplog.text


@pytest.mark.parametrize("name", ["digests.json", "line_ema.safetensors", "optimizer.bin", "state.json"])
def test_a_checkpoint_without_whole_digests_is_passed_over_too(run, name, caplog):
    """After a power cut, or copied in part."""
    folder, go_on = run
    expected, last = weights(folder), folder / "checkpoints/step_000006"
    os.truncate(last / "digests.json", 0)
    if name != "digests.json":
        (last / "digests.json").unlink()
        (last / name).unlink()
    go_on()
    assert "step_000006" in caplog.text and "digests.json" in caplog.text
    assert "resumes from step_000004" in caplog.text
    assert torch.equal(weights(folder), expected)


def test_killed_while_removing_a_checkpoint_it_is_not_partial(run, monkeypatch):
    """The old checkpoint is whole or hidden."""
    folder, go_on = run

    def killed(path, **options):
        if list(path.rglob("digests.json")):
            raise KeyboardInterrupt

    monkeypatch.setattr("files.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on("--loop.max_steps=8", "--loop.keep_checkpoints=2")
    monkeypatch.undo()
    assert all((path / "digests.json").is_file() for path in list_checkpoints(folder / "checkpoints"))
    remove_leftovers(folder / "checkpoints")
    assert sorted(path.name[-1] for path in (folder / "checkpoints").iterdir()) == ["4", "6", "8"]


@pytest.mark.parametrize("name,text", [("config.yaml", ""), ("config.yaml", "a: ["), ("volumes.json", "[1]")])
def test_a_damaged_record_of_the_run_is_named(run, name, text):
    folder, go_on = run
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"run/{name}: "):
        go_on("--loop.max_steps=8")


def test_a_model_that_cannot_be_written_keeps_the_older_one(tmp_path):
    """The error gives a remedy."""

    class Model:
        def save_pretrained(self, folder, **_):
            os.makedirs(folder, exist_ok=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "vae").mkdir()
    with pytest.raises(RuntimeError, match=r"vae: could not be written .*No space left.*--resume latest"):
        save_model(Model(), tmp_path / "vae")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_no_whole_checkpoint_is_an_error_that_names_all(run):
    folder, go_on = run
    for path in list_checkpoints(folder / "checkpoints"):
        os.truncate(path / "optimizer.bin", 10)
    with pytest.raises(ValueError, match=r"(?s)no intact checkpoint.*step_000006.*step_000004.*step_000002"):
        go_on()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="step_000004: optimizer.bin"):  # what was asked for by name is not replaced
        go_on(f"--resume={folder / 'checkpoints/step_000004'}")


def test_checkpoints_after_the_requested_one_are_set_aside(run):
    """Else `--resume latest` would take it for this run's."""
    folder, go_on = run
    go_on(f"--resume={folder / 'checkpoints/step_000002'}", "--loop.max_steps=3")
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_000002", "step_000003"]
    assert {path.name for path in (folder / "checkpoints").glob("aside_*")} == {
        "aside_step_000004",
        "aside_step_000006",
    }


@pytest.mark.parametrize("kind", ["enospc", "limit"])
def test_a_full_disk_ends_the_run_and_leaves_its_checkpoints(run, kind, monkeypatch):
    folder, go_on = run
    there = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if kind == "enospc":

        def full(*args, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("training.engine.checkpoints.save_file", full)
        message = "No space left on device"
    else:  # what torch writes meets the limit first: its own error, as on a full disk
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        monkeypatch.setattr("accelerate.accelerator.save_accelerator_state", lambda *a, **k: fill(a[0], limits))
        message = "inline_container"
    try:
        with pytest.raises(
            RuntimeError, match=rf"(?s)step_000008: the checkpoint could not.*{message}.*Make room.*--resume"
        ):
            go_on("--loop.max_steps=8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == there


def fill(folder, limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    torch.save({"weight": torch.zeros(10_000)}, f"{folder}/model.bin")


def test_an_unwritable_output_is_refused_before_reading_data(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run: cannot be written to: File exists; choose another folder"):
        make_accelerator(line_config(tmp_path))


def test_a_full_disk_in_generation_has_a_remedy(tmp_path):
    match = r"out: No space left on device; make room, and run the same command again"
    with pytest.raises(ValueError, match=match), explain_disk_full(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), explain_disk_full(tmp_path):
        open(tmp_path / "other")


def test_a_timeout_must_be_some():
    with pytest.raises(ValueError, match="timeout_minutes: got 0, expected a number, above 0"):
        LoopConfig(timeout_minutes=0)


# Data


def files(folder, count=5):
    for number in range(count):
        image, mask, _ = make_phantom(number, (12, 12, 12))
        write_volume(image, folder / f"images/case_{number}.nii.gz")
        write_volume(mask, folder / f"labels/case_{number}.nii.gz")
    return DataConfig(root=str(folder), images="images/{name}.nii.gz", masks="labels/{name}.nii.gz", label_names=LABELS)


LABELS = {0: "background", 1: "body", 2: "organ", 3: "lesion"}


def test_a_volume_that_changed_between_two_runs_is_named(tmp_path):
    config = files(tmp_path)
    before = digests(VolumeDataset(load_cases(config), config))
    assert digests(VolumeDataset(load_cases(config), config)) == before and len(set(before.values())) == 5
    image, _, _ = make_phantom(77, (12, 12, 12))
    write_volume(image, tmp_path / "images/case_1.nii.gz")
    for kind in ("images", "labels"):
        (tmp_path / kind / "case_3.nii.gz").unlink()
    after = digests(VolumeDataset(load_cases(config), config))
    assert content_changes(before, after) == {
        "volume case_1": "has other voxels or conditions",
        "volume case_3": "is missing now",
    }
    assert content_changes(after, before)["volume case_3"] == "is new"


def test_changed_and_broken_volumes_stop_a_run(tmp_path):
    """A run whose volumes changed is refused, and one with a broken volume names it."""
    config = files(tmp_path / "data")
    data = [f"--data.root={tmp_path / 'data'}", "--data.images=images/{name}.nii.gz", "--data.phantom=null"]
    data += ["--data.masks=labels/{name}.nii.gz", "--data.label_names={0: background, 1: body, 2: organ, 3: lesion}"]

    def train(*args):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_vae.main([f"--output={tmp_path / 'run'}", *COMMON, *VAE, *data, "--loop.max_steps=2", *args])

    train()
    path = tmp_path / "data/images/case_1.nii.gz"
    whole = path.read_bytes()
    image, _, _ = make_phantom(77, (12, 12, 12))
    write_volume(image, path)
    with pytest.raises(ValueError, match=r"volume case_1: has other voxels or conditions\nUndo these"):
        train("--loop.max_steps=3", "--resume=latest")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VolumeError, match="case_1.nii.gz"):
        train("--loop.max_steps=3", "--resume=latest")
    path.write_bytes(whole)
    train("--loop.max_steps=3", "--resume=latest")
    assert config.root == str(tmp_path / "data")


def test_nan_in_the_data_is_refused_by_name(tmp_path):
    import nibabel as nib
    import numpy as np

    config = files(tmp_path, 2)
    path = tmp_path / "images/case_1.nii.gz"
    array = np.asarray(nib.load(path).dataobj, dtype=np.float32).copy()
    array[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(array, nib.load(path).affine), path)
    with pytest.raises(VolumeError, match=r"case_1.nii.gz.*(?i:nan|finite)"):
        VolumeDataset(load_cases(config), config)


def test_a_full_disk_under_the_latent_cache_leaves_nothing(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    config = files(tmp_path, 2)
    dataset = VolumeDataset(load_cases(config), config)

    def full(entry, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diffusion.latents.entry.save_file", full)
    with pytest.raises(ValueError, match="could not be written .*No space left on device.*cache.folder"):
        build_latent_cache(dataset, vae, tmp_path / "other", progress=False)
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]


# Losses


def test_a_spike_is_told_with_a_remedy():
    watch = SpikeWatch()
    for loss in (5.0, 3.0, 2.0, 1.0, 1.0, 1.1, 0.9):
        assert watch(loss) is None
    told = watch(8.0)  # the median is 1.1
    assert told is not None and "rose to 8, 7.3 times the median of the last 7 reports (1.1)" in told
    assert "optimizer.learning_rate" in told and "--accept_changes true" in told
    assert watch(4.3) is None
    adversarial = SpikeWatch()
    assert [adversarial(-1.0) for _ in range(6)] == [None] * 6 and adversarial(
        9.0
    ) is None  # no ratio of losses below 0


def test_the_loop_tells_of_a_spike(tmp_path, monkeypatch, caplog):
    loop, _step = line_loop(line_config(tmp_path, "--loop.max_steps=150", "--optimizer.learning_rate=1e-30"))
    original = LineStep.__call__

    def spiking(self, batch, generators):
        losses = original(self, batch, generators)
        return {name: value * (100 if self.calls > 35 else 1) for name, value in losses.items()}

    monkeypatch.setattr(LineStep, "__call__", spiking)
    with caplog.at_level("WARNING", logger="training"):
        loop.run()
    assert len([r for r in caplog.records if "step 40: the loss rose" in r.message]) == 1


def test_a_collapsed_codebook_is_told_with_a_remedy():
    step = make_step(VQGAN3D, num_codes=16)
    losses = {name: value.item() for name, value in step(batch(), generators()).items()}
    assert losses["perplexity"] > 2 and step.review(losses) == []
    step.vae.network.codebook.codes.zero_()
    step.vae.network.codebook.codes[0] = 100  # all cells are nearest to the zeros, of which the first is taken
    losses = {name: value.item() for name, value in step(batch(), generators()).items()}
    (told,) = step.review(losses)
    assert "has collapsed: latent voxels use 1.0" in told and "losses.commitment" in told
    assert make_step().review({"loss": 1.0}) == []  # no codebook


def test_state_of_the_run_is_in_its_checkpoint(run):
    folder, _ = run
    state = json.loads((folder / "checkpoints/step_000006/state.json").read_text())
    assert state["processes"] == 1 and state["samples"] == 18


def test_a_job_that_fails_when_it_goes_on_is_told(tmp_path, monkeypatch):
    """Even if it works another time."""

    class Process:
        def __init__(self, exitcode):
            self.exitcode = exitcode

        def join(self, *_):
            pass

        kill = join

    ends = iter([None, 3, None])
    (tmp_path / "job.log").write_text("it fell over")
    monkeypatch.setattr(survival.forked, "start", lambda *_: Process(next(ends)))
    monkeypatch.setattr(survival.forked, "run", lambda *_: None)
    monkeypatch.setattr(survival, "run_undisturbed", lambda *_: (0.1, []))
    job = survival.Job("job", "script", lambda folder: [], lambda folder: {}, lambda folder: {})
    found = survival.torture(job, tmp_path, 2, random.Random(0))
    assert found["kills"] == 2 and found["lost_or_different"] == ["ended with 3: it fell over"]


def test_survival_reports_leftovers_locks_and_bad_repairs(tmp_path, monkeypatch):
    """A job that never ends its work: it leaves a hidden folder, another process holds its output, and an entry stays
    zeroed."""

    class Process:
        exitcode = None

        def join(self, *_):
            pass

        kill = join

    place, chance = tmp_path / "job_1", random.Random(0)
    (place / "latents/key").mkdir(parents=True)
    entry = place / "latents/key/00000_00.safetensors"
    save_file({"mean": torch.ones(8)}, entry)
    stat = entry.stat()
    monkeypatch.setattr(survival.forked, "start", lambda *_: Process())
    monkeypatch.setattr(survival.forked, "run", lambda *_: (place / ".unfinished-1").mkdir(exist_ok=True))
    monkeypatch.setattr(survival, "run_undisturbed", lambda *_: (0.1, []))
    content = lambda folder: {str(one): load_file(one)["mean"].tolist() for one in folder.glob("latents/*/*")}  # noqa: E731
    job = survival.Job("job", "script", lambda _: [], lambda _: {}, content, holds=True, damage=survival.zero_an_entry)
    with only_writer(place):
        found = survival.torture(job, tmp_path, 1, chance)
    held, left, different = found["lost_or_different"]
    assert "another process writes there" in held and left == "left behind: .unfinished-1"
    assert different.startswith("other than the undisturbed run") and found["damaged_entries"] == [entry.name]
    assert not load_file(entry)["mean"].any()
    assert (entry.stat().st_size, entry.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
