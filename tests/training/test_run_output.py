"""A run's output folder: one job at a time, no links, nothing half written, whatever ends the job."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from line import LineData, LineStep, line_config
from short_runs import COMMON, VAE
from torch import nn

import train_vae
from autoencoder import AutoencoderKL3D
from files.locks import HOLDER, LOCK, OutputInUse, only_writer
from files.writable import check_output_folder
from training import (
    Learner,
    Loop,
    ResumableBatchSampler,
    TrainVaeConfig,
    list_checkpoints,
    make_accelerator,
    open_run,
    parse_config,
)
from training.engine.checkpoints import digest_files
from training.engine.config import config_changes, to_plain
from training.engine.run import WRITTEN

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def begun(config, data=None, **options):
    """A loop of `test_training.line_loop` in an output that it holds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with open_run(config, "train_vae.py", []) as accelerator:
        torch.manual_seed(0)
        line = nn.Linear(1, 1, bias=False)
        loop = config.loop
        learner = Learner("line", line, config.optimizer, ema_decay=loop.ema_decay, max_steps=loop.max_steps)
        step = LineStep(learner, **options)
        yield Loop(accelerator, config, step, data or LineData(), [LineData()[i] for i in range(3)])


SHORT = ["--loop.max_steps=4", "--loop.checkpoint_every=2", "--loop.trackers=[csv, tensorboard]", "--loop.previews=1"]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that has ended, with a checkpoint, a table, logs and a preview."""
    with begun(line_config(tmp_path, *SHORT)) as loop:
        loop.run()
    return tmp_path / "run"


def everything(folder: Path) -> dict[str, tuple]:
    """Content, inode and times of all files and folders."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (stat.st_ino, stat.st_mtime_ns, stat.st_mode, content)
    return found


# One job at a time


def test_a_second_job_is_refused_and_leaves_the_first_alone(run, tmp_path):
    unfinished = run / "checkpoints/.unfinished-1/new/step_000006"
    unfinished.mkdir(parents=True)  # as old as a leftover, to be removed by who holds the output alone
    os.utime(unfinished.parents[1], (1, 1))
    with only_writer(run):
        before = everything(run)
        for args in (["--resume=latest", "--loop.max_steps=8"], [f"--resume={run / 'checkpoints/step_000002'}"]):
            match = rf"another process writes there: process {os.getpid()} on "
            with pytest.raises(OutputInUse, match=match), begun(line_config(tmp_path, *SHORT, *args)):
                pytest.fail("began")
        assert everything(run) == before
    with begun(line_config(tmp_path, *SHORT, "--resume=latest")):
        assert not unfinished.exists() and (run / HOLDER).is_file()
    assert not (run / HOLDER).exists()


HOLDS = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from files.locks import only_writer
with only_writer(Path(sys.argv[2])):
    print("ready", flush=True)
    sys.stdin.read()
    if len(sys.argv) > 3:
        os.rename(sys.argv[3], sys.argv[4])
"""


@pytest.fixture
def holder(monkeypatch):
    """Start another job that holds a folder, and at its end renames something; it ends as soon as this one waits."""

    def start(folder: Path, *names: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDS, ROOT, folder, *names]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "ready\n"

        def end(_):
            process.stdin.close()
            assert process.wait() == 0  # without a timeout, for which it would sleep

        monkeypatch.setattr("files.locks.time.sleep", end)
        return process

    return start


def test_a_requeued_job_waits_for_the_ending_one_and_resumes(run, tmp_path, capsys, holder):
    process = holder(run)
    with begun(line_config(tmp_path, *SHORT, "--resume=latest", "--wait_minutes=9", "--loop.max_steps=6")) as loop:
        assert process.returncode == 0 and loop.state.step == 4
        loop.run()
    assert f"waiting for another process that writes to {run}: process {process.pid}" in capsys.readouterr().out
    (run / "checkpoints").rename(tmp_path / "written")
    process = holder(run, tmp_path / "written", run / "checkpoints")  # written while this one waits
    config = line_config(tmp_path, *SHORT, "--wait_minutes=9")
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume latest"), begun(config):
        pytest.fail("began")
    assert process.returncode == 0


def test_wait_minutes_is_documented_checked_and_no_change(tmp_path, capsys, monkeypatch):
    """It does not change the run's config."""
    config = line_config(tmp_path, "--wait_minutes=2.5")
    assert config.wait_minutes == 2.5 and line_config(tmp_path).wait_minutes == 0
    assert config_changes(to_plain(line_config(tmp_path)), config) == {}
    for wrong in ("-1", "nan", "inf", "soon"):
        with pytest.raises(ValueError, match="wait_minutes"):
            line_config(tmp_path, f"--wait_minutes={wrong}")
    with pytest.raises(SystemExit):
        parse_config(TrainVaeConfig, ["--help"])
    assert "--wait_minutes" in capsys.readouterr().out
    monkeypatch.setattr("training.engine.run.check_together", lambda _: None)
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(
        ValueError, match="wait_minutes 2.5 must be below loop.timeout_minutes 2, .*raise loop.timeout_minutes"
    ):
        make_accelerator(line_config(tmp_path, "--wait_minutes=2.5", "--loop.timeout_minutes=2"))


# Links


@pytest.mark.parametrize("name", [*WRITTEN, "checkpoints/step_000004", "checkpoints/step_000099", "checkpoints/other"])
def test_links_where_a_run_writes_are_refused_by_name(run, tmp_path, name):
    there = tmp_path / "there"
    if (run / name).exists():
        (run / name).rename(there)
    (run / name).symlink_to(there)  # dangling, if it was not there
    before = everything(tmp_path)
    with (
        pytest.raises(ValueError, match=f"run/{name}: is a link"),
        begun(line_config(tmp_path, *SHORT, "--resume=latest")),
    ):
        pytest.fail("began")
    after = everything(tmp_path)
    ours = [str(path) for path in (run, run / LOCK)]  # it was held
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


def test_linked_files_are_replaced_and_the_output_may_be_linked(tmp_path):
    disk, precious = tmp_path / "disk", tmp_path / "precious"
    disk.mkdir()
    (tmp_path / "run").symlink_to(disk)
    precious.write_text("precious")
    names = ("config.yaml", "volumes.json", "metrics.csv", "metrics.json", "metrics.jsonl")
    for name in names:
        (disk / name).symlink_to(precious)
    with begun(line_config(tmp_path, *SHORT)) as loop:
        loop.run()
        assert not [name for name in names if (disk / name).is_symlink()]
        for name in ("metrics.csv", "metrics.jsonl"):
            written = (disk / name).read_bytes()
            (disk / name).unlink()
            (disk / name).symlink_to(precious)  # planted while it runs
            with pytest.raises(RuntimeError, match=f"{name}: could not be written"):
                loop.accelerator.log({"train/loss": 1.0}, step=5)
            (disk / name).unlink()
            (disk / name).write_bytes(written)
    assert precious.read_text() == "precious"
    assert [path.name for path in list_checkpoints(disk / "checkpoints")] == ["step_000002", "step_000004"]


# What is left, and what is on the disk


def test_leftovers_are_removed_and_a_replaced_model_put_back(run, tmp_path):
    """Killed between the renames that replace vae/, and in a checkpoint and a preview."""
    for folder in (run, run / "checkpoints", run / "previews"):
        (folder / ".unfinished-1/new").mkdir(parents=True)
        (folder / ".unfinished-1/lock").touch()
    (run / ".unfinished-1/replaced/vae").mkdir(parents=True)
    (run / ".unfinished-1/replaced/vae/config.json").write_text("{}")
    with begun(line_config(tmp_path, *SHORT, "--resume=latest")):
        assert not list(run.rglob(".unfinished-*"))
    assert (run / "vae/config.json").read_text() == "{}"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, named, fsync, rename = set(), {}, os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))

    def note(source, target):
        if Path(target).name.startswith("step_") and Path(target).parent.name == "checkpoints":
            named[Path(target).name] = [p.name for p in Path(source).rglob("*") if p.stat().st_ino not in synced]
        rename(source, target)

    monkeypatch.setattr(os, "rename", note)
    with begun(line_config(tmp_path, *SHORT, "--loop.keep_checkpoints=1")) as loop:
        loop.run()
    assert named == {"step_000002": [], "step_000004": []}
    checkpoint = tmp_path / "run/checkpoints/step_000004"
    assert json.loads((checkpoint / "digests.json").read_text()) == digest_files(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step_000004"]


@pytest.mark.parametrize("where", ["tempfile.mkdtemp", "training.engine.checkpoints.digest_files"])
def test_a_full_disk_in_a_checkpoint_keeps_the_older_ones(run, tmp_path, monkeypatch, where):
    """Nothing of the new checkpoint stays."""
    mkdtemp = tempfile.mkdtemp

    def full(*_, **options):
        if options.get("dir") in (None, run / "checkpoints"):
            raise OSError(28, os.strerror(28))
        return mkdtemp(**options)

    with begun(line_config(tmp_path, *SHORT, "--resume=latest", "--loop.max_steps=6")) as loop:
        monkeypatch.setattr(where, full)
        with pytest.raises(RuntimeError, match=r"step_000006: the checkpoint could not .*No space left.*step_000004"):
            loop.run()
        monkeypatch.undo()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_000002", "step_000004"]


def test_a_sigterm_in_a_checkpoint_lets_it_be_finished(tmp_path, monkeypatch):
    from training.engine import checkpoints

    save_file = checkpoints.save_file

    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save_file(*args)

    monkeypatch.setattr(checkpoints, "save_file", terminated)
    with pytest.raises(SystemExit) as end, begun(line_config(tmp_path, *SHORT, "--loop.max_steps=8")) as loop:
        loop.run()
    assert end.value.code == 143
    monkeypatch.undo()
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert json.loads((checkpoint / "digests.json").read_text()) == digest_files(checkpoint)
    with begun(line_config(tmp_path, *SHORT, "--loop.max_steps=8", "--resume=latest")) as loop:
        assert loop.state.step == int(checkpoint.name[-1]) < 8


def test_a_sigterm_while_saving_leaves_no_partial_model(tmp_path, monkeypatch):
    """A resumed run writes it."""
    save = AutoencoderKL3D.save_pretrained

    def terminated(self, folder, **options):
        save(self, folder, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    args = [*COMMON, *VAE, f"--output={tmp_path / 'run'}", "--loop.max_steps=1"]
    monkeypatch.setattr(AutoencoderKL3D, "save_pretrained", terminated)
    with pytest.raises(SystemExit) as end:
        train_vae.main(args)
    assert end.value.code == 143
    assert not (tmp_path / "run/vae").exists() and not list((tmp_path / "run").rglob(".unfinished-*"))
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train_vae.main([*args, "--resume=latest"])
    assert (tmp_path / "run/vae/config.json").is_file()


def test_the_newest_checkpoint_has_the_last_step(run, tmp_path):
    """The times of the files do not matter."""
    for number, name in enumerate(("step_000004", "step_000002")):
        for path in [run / "checkpoints" / name, *(run / "checkpoints" / name).iterdir()]:
            os.utime(path, (time.time() + 1e6 * number,) * 2)
    with begun(line_config(tmp_path, *SHORT, "--resume=latest")) as loop:
        assert loop.state.step == 4


def test_a_read_only_folder_is_refused_before_the_work():
    """It is one that an ordinary user cannot write to."""
    if not hasattr(os, "seteuid") or os.getuid() != 0:
        pytest.skip("needs an administrator who can become an ordinary user")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    folder.chmod(0o755)
    try:
        os.chown(run, 65534, 65534)
        os.seteuid(65534)
        with (
            pytest.raises(ValueError, match="run/checkpoints: cannot be written to: Permission denied; choose another"),
            begun(line_config(folder, *SHORT)),
        ):
            pytest.fail("began")
        run.chmod(0o555)
        with pytest.raises(ValueError, match="run: cannot be written to: Permission denied; choose another"):
            check_output_folder(run)
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


# Checkpoints that somebody changed


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(run, tmp_path, caplog):
    whole = tmp_path / "whole"
    shutil.copytree(run / "checkpoints", whole)
    names = [path.name for path in sorted((whole / "step_000004").iterdir())]
    assert {"digests.json", "state.json", "optimizer.bin", "model.safetensors", "random_states_0.pkl"} <= {*names}
    for number, name in enumerate(names):
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(whole, run / "checkpoints")
        path = run / "checkpoints/step_000004" / name
        content = bytearray(path.read_bytes())
        content[(number * 7919) % len(content)] ^= 1 << number % 8
        path.write_bytes(content)
        caplog.clear()
        with begun(line_config(tmp_path, *SHORT, "--resume=latest")) as loop:
            assert loop.state.step == 2, name
        assert "step_000004" in caplog.text


@pytest.mark.parametrize("forged", [None, "{}", "[]", "", '{"model.safetensors": 1}', '{"\\u001b[31m": "x", "a": 1}'])
def test_a_checkpoint_without_valid_digests_is_not_complete(run, tmp_path, caplog, forged):
    """Its list of digests is missing or forged."""
    path = run / "checkpoints/step_000004/digests.json"
    path.unlink() if forged is None else path.write_text(forged)
    with begun(line_config(tmp_path, *SHORT, "--resume=latest")) as loop:
        assert loop.state.step == 2
    assert "step_000004" in caplog.text and caplog.text.replace("\n", "").isprintable()


# Losses that are not finite


class NamedData(LineData):
    names = [f"case_{number}" for number in range(8)]


def test_a_step_that_is_skipped_names_its_samples(tmp_path, caplog):
    args = ["--loop.max_steps=6", "--optimizer.gradient_accumulation=2", "--loop.trackers=[]"]
    for data, names in ((NamedData(), NamedData.names), (LineData(), [f"sample {number}" for number in range(8)])):
        caplog.clear()
        output = f"--output={tmp_path / names[0]}"
        with begun(line_config(tmp_path, *args, output), data, poison=[5]) as loop:  # the second part of the third step
            loop.run()
            batches = [batch for batch, _ in zip(ResumableBatchSampler(8, 3, seed=0), range(6), strict=False)]
        expected = ", ".join(names[index] for _, index in batches[5])
        (told,) = [record.getMessage() for record in caplog.records if "skipped, because" in record.getMessage()]
        assert told == f"step 3: skipped, because its loss is not finite. Its samples: {expected}"


def test_a_validation_that_is_not_finite_names_its_volume(tmp_path, monkeypatch, caplog):
    validate = LineStep.validate

    def broken(self, item, generator):
        return {"error": float("nan")} if item["x"].item() == 0.125 else validate(self, item, generator)

    monkeypatch.setattr(LineStep, "validate", broken)
    with begun(line_config(tmp_path, *SHORT)) as loop:
        loop.run()
    assert "step 4: validation volume item 1: error is not finite" in caplog.text
