"""Several processes do what one does, and end together. They are forked (benchmarks/forked.py), two on a CPU, through
gloo."""

import json
import os
import re
import signal
from datetime import timedelta

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from jsonargparse import Namespace
from tiny import labels_of, tiny_pipeline
from waiting import when

import evaluate
from autoencoder import AutoencoderKL3D
from benchmarks import forked
from benchmarks.phantom_set import write_phantoms
from benchmarks.processes import ALL, DATA, LOOP, VAE, compare
from evaluation.commands import COMMANDS, common
from evaluation.commands import run_all as everything
from evaluation.commands.ledger import Ledger
from evaluation.studies.training_result import TrainingResult
from files.locks import only_writer
from training import join_processes, list_checkpoints

SHAPE = (16, 16, 16)
LONG = [*VAE, *DATA, *LOOP, "--loop.batch_size=2", "--loop.max_steps=100000"]
QUICK = ["--device", "cpu", "--precision", "no", "--shape", "16", "16", "16", "--iterations", "2", "--seeds", "2"]


@pytest.fixture
def data(tmp_path):
    """Five phantoms as files, one of them for testing, one generated from every mask."""
    write_phantoms(tmp_path, range(5), tests=1)
    return tmp_path


QUICK_RUNS = {"train_vae": ("one", "sharded"), "train_ldm": ("one", "two")}


@pytest.mark.parametrize("chosen", [QUICK_RUNS, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_several_processes_have_the_losses_of_one(tmp_path, chosen):
    """With whole and with sharded weights. Those of a run prepare the volumes together."""
    found = compare(4, tmp_path, chosen)
    for script in ("train_vae", "train_ldm"):
        losses, differences = found[script]["losses"], found[script]["largest_relative_difference"]
        assert list(losses) == list(chosen[script])
        assert {len(values) for values in losses.values()} == {4} and len(set(losses["one"])) == 4
        assert max(differences.values()) < 1e-4, losses
        stored = [len([*(tmp_path / script / run / "cache/prepared").glob("*.safetensors")]) for run in losses]
        assert set(stored) == {10}


@pytest.mark.slow  # half a minute; the other tests here run two processes, too
def test_two_processes_compare_generated_volumes_as_one(tmp_path):
    """An odd number of volumes, which the processes share: the distances and their floor are those of one process."""
    torch.manual_seed(0)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    vae.set_latent_statistics([0.1] * 4, [0.5] * 4)
    vae.save_pretrained(tmp_path / "vae")
    model = "{class: diffusion.LatentUNet3D, channels: [8, 16], blocks: [1, 1], head_dim: 8, mask_width: 4}"
    args = [f"--model={model}", f"--vae={tmp_path / 'vae'}", "--data.phantom={count: 12, shape: [12, 12, 12]}"]
    args += ["--data.validation_fraction=0.45", *LOOP, "--cache.versions=1", "--inference_steps=2"]
    args += ["--loop.sample_every=2", "--loop.sample_volumes=5", "--loop.max_steps=4", "--optimizer.warmup_steps=0"]
    forked.run("train_ldm", [*args, f"--output={tmp_path / 'one'}", "--loop.batch_size=2"], tmp_path / "one.txt")
    two = forked.start_two(
        "train_ldm", [*args, f"--output={tmp_path / 'two'}", "--loop.batch_size=1"], tmp_path / "two.txt"
    )
    assert [forked.ended(one) for one in two] == [0, 0], (tmp_path / "two.0").read_text()[-2000:]
    one, both = (
        [
            (line["step"], line["kernel_distance"], line["kernel_distance/floor"])
            for line in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
            if "kernel_distance" in line
        ]
        for run in ("one", "two")
    )
    assert [step for step, _, _ in one] == [2, 4] and one[0][1] != one[1][1]
    assert np.array(both) == pytest.approx(np.array(one), rel=1e-3, abs=1e-5)
    assert "(5 generated volumes)" in (tmp_path / "two.0").read_text()


def test_a_dead_process_ends_the_others_with_a_message(tmp_path):
    lines = tmp_path / "losses.jsonl"
    two = forked.start_two("train_vae", [*LONG, f"--output={tmp_path / 'run'}"], tmp_path / "log.txt", losses=lines)
    when(lines.is_file, two)
    two[1].kill()
    assert forked.ended(two[0], 60) == 1
    said = (tmp_path / "log.0").read_text()
    assert "process 0 of 2: another process has ended, or does not answer" in said and "--resume latest" in said


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_after_a_timeout(tmp_path):
    lines = tmp_path / "losses.jsonl"
    args = [*LONG, f"--output={tmp_path / 'run'}", "--loop.timeout_minutes=0.4"]
    two = forked.start_two("train_vae", args, tmp_path / "log.txt", losses=lines)
    when(lines.is_file, two)
    os.kill(two[1].pid, signal.SIGSTOP)
    try:
        assert forked.ended(two[0], 90) == 1
    finally:
        two[1].kill()
    assert "another process has ended, or does not answer" in (tmp_path / "log.0").read_text()


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_with_a_checkpoint(tmp_path):
    lines, run = tmp_path / "losses.jsonl", tmp_path / "run"
    args = [*LONG, f"--output={run}", "--loop.workers=1"]
    two = forked.start_two("train_vae", args, tmp_path / "log.txt", losses=lines)
    when(lines.is_file, two)
    os.kill(two[1].pid, signal.SIGTERM)
    assert [forked.ended(one) for one in two] == [143, 143]
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["processes"] == 2 and state["samples"] == 4 * state["step"] > 0
    assert f"SIGTERM: wrote {checkpoint}" in (tmp_path / "log.0").read_text()
    with pytest.raises(RuntimeError, match="was written by 2 processes, but this run has 1; launch as many as before"):
        forked.run("train_vae", [*args, "--loop.workers=0", "--resume=latest"], tmp_path / "alone.txt")


def test_an_interrupt_of_all_processes_stops_them_at_one_step(tmp_path):
    """As a terminal sends it: to both."""
    lines, run = tmp_path / "losses.jsonl", tmp_path / "run"
    two = forked.start_two("train_vae", [*LONG, f"--output={run}"], tmp_path / "log.txt", losses=lines)
    when(lines.is_file, two)
    for one in two:
        os.kill(one.pid, signal.SIGINT)
    assert [forked.ended(one) for one in two] == [130, 130]
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert f"SIGINT: wrote {checkpoint}" in said[0]
    assert re.search(r"continue with the same launcher and: \S*train_vae\.py --config=", said[0])
    assert [text.count("Ctrl-C: finishing step") for text in said] == [1, 0] and "Traceback" not in "".join(said)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("training.engine.processes.on_cpu", lambda: False)  # what Accelerate assumes by itself
    with pytest.raises(ValueError, match="2 processes were launched, but Accelerate sees 1.*torchrun"):
        join_processes(timedelta(seconds=5))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_all_processes_of_a_refused_job_end_with_its_message(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with only_writer(run):
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
        args = [*LONG, f"--output={run}", "--resume=latest"]
        two = forked.start_two("train_vae", args, tmp_path / "log.txt")
        assert [forked.ended(one) for one in two] == [1, 1]
        assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    for rank in range(2):
        assert f"another process writes there: process {os.getpid()}" in (tmp_path / f"log.{rank}").read_text()


# Evaluation


def scored(path):
    """All that a report says but when, how long and on which machine."""
    report = json.loads(path.read_text())
    rows = report.get("rows") or [{"arm": arm, **row} for arm, found in report["scores"].items() for row in found]
    figures = {key: report.get(key) for key in ("dice", "ratios", "differences", "content", "volumes")}
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows], figures


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("few_labels", "pretrain")]  # the ledger is dice's


@pytest.mark.parametrize("name", ["dice", *_SLOW])
def test_trainings_are_shared_and_the_report_is_that_of_one(data, name):
    own = {"dice": ["--seeds", "1"], "few_labels": ["--labels", "2", "all", "--train_on", "real", "both"]}
    own["pretrain"] = ["--labels", "2", "--starts", "scratch", "synthetic", "--pretrain_iterations", "2"]
    common = [name, "--config", str(data / "config.yaml"), "--synthetic", str(data / "made"), *QUICK, *own[name]]
    evaluate.main([*common, "--output", str(data / "out/one.json")])
    two = forked.start_two("evaluate", [*common, "--output", str(data / "out/two.json")], data / "two.txt")
    assert [forked.ended(one) for one in two] == [0, 0], (data / "two.0").read_text()[-2000:]
    assert scored(data / "out/one.json") == scored(data / "out/two.json")
    said = [(data / f"two.{rank}").read_text().count(", seed ") for rank in range(2)]
    assert min(said) > 0  # both trained
    assert sorted(path.name for path in (data / "out").glob("[!.]*")) == ["one.json", "two.json"]


def test_work_finished_by_others_survives_the_main_process(tmp_path):
    def row(seed):
        return TrainingResult(
            arm="real", labels="8", seed=seed, dice=0.5, per_label=[0.5], per_volume=[0.5], seconds=1.0
        )

    report = {"evaluation": "few_labels", "protocol": {}, "data": {}, "synthetic": "made", "content": "of these"}
    path, jobs = tmp_path / "few.json", [("real", "8", seed) for seed in range(4)]

    def ledger():
        return Ledger(path, report, lambda rows: {"rows": [one.as_json() for one in rows]})

    first = ledger()
    first.missing(jobs)
    first.add(row(2))
    (tmp_path / ".few.json.part1").write_text(
        json.dumps({**report, "rows": [row(1).as_json()]})
    )  # its process wrote this
    second = ledger()
    assert second.missing(jobs) == [jobs[0], jobs[3]] and not list(tmp_path.glob(".few*"))
    second.add(row(0))
    assert [one["seed"] for one in second.write()["rows"]] == [0, 1, 2]
    (tmp_path / ".few.json.part1").write_text(
        json.dumps({**report, "content": "of others", "rows": [row(3).as_json()]})
    )
    with pytest.raises(ValueError, match="part1: holds figures of another content"):
        ledger()


def test_one_refusal_ends_all_processes_before_generation(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "masks").mkdir()
    for number in range(4):
        labels = labels_of(SHAPE, number)
        labels[3:5] = 99 if number == 1 else 0  # of the second process
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / f"masks/case_{number}.nii.gz")
    args = ["--pipeline", str(tmp_path / "pipeline"), "--masks", str(tmp_path / "masks"), "--steps", "1"]
    two = forked.start_two("generate", [*args, "--output", str(tmp_path / "out")], tmp_path / "log.txt")
    assert [forked.ended(one) for one in two] == [1, 1]
    assert "case_1.nii.gz: mask holds labels [99]" in (tmp_path / "log.1").read_text()
    said = (tmp_path / "log.0").read_text()
    assert "process 0 of 2: another process has ended" in said and "it resumes" in said
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_jobs_are_shared_by_cost_and_kept_together(tmp_path):
    report = {"evaluation": "e", "content": ""}
    jobs = [(arm, labels, seed) for seed in range(2) for arm in ("a", "b") for labels in ("8", "16")]
    shares = []
    for process in range(2):
        ledger = Ledger(tmp_path / "none.json", report, lambda rows: {"rows": [one.as_json() for one in rows]})
        ledger.state = type("State", (), {"num_processes": 2, "process_index": process})()
        cost = lambda group: sum(5 if arm == "a" else 1 for arm, _, _ in group)  # noqa: E731
        shares.append(ledger.share(jobs, cost, lambda job: (job[0], job[2])))
    assert sorted(shares[0] + shares[1]) == sorted(jobs) and not set(shares[0]) & set(shares[1])
    assert [sorted({(arm, seed) for arm, _, seed in share}) for share in shares] == [
        [("a", 0), ("b", 0)],
        [("a", 1), ("b", 1)],
    ]


def test_an_unwritable_report_is_refused_before_training(data):
    (data / "file").touch()
    args = ["dice", "--config", str(data / "config.yaml"), "--synthetic", str(data / "made"), *QUICK]
    with pytest.raises(ValueError, match="file/dice.json: cannot be written to: .*choose another folder"):
        evaluate.main([*args, "--output", str(data / "file/dice.json")])


def test_commands_that_cannot_be_shared_are_the_main_processs(monkeypatch):
    class Command:
        name, ran, divides, reads_data, makes_folder = "command", 0, False, False, False

        @classmethod
        def run(cls, *_):
            cls.ran += 1
            return {"figure": 1}

    class State:
        is_main_process = False

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(common, "PartialState", State)
    assert common.run_command(Command, Namespace(), None, None) == {} and Command.ran == 0
    Command.divides = True
    assert common.run_command(Command, Namespace(), None, None) == {"figure": 1}


def test_what_one_process_refuses_leaves_no_other_waiting(tmp_path, monkeypatch):
    """Of two processes: an error in a part that they share ends both; in one that is the main process's own, both go
    on."""
    options = Namespace(output=str(tmp_path / "report.json"), wait_minutes=0)

    class State:
        is_main_process, num_processes, waited = True, 2, 0

        def wait_for_everyone(self):
            State.waited += 1

    def refuse(*_):
        raise ValueError("seen")

    for module in (common, everything):
        monkeypatch.setattr(module, "PartialState", State)
    monkeypatch.setattr(common, "check_test_set", refuse)
    monkeypatch.setattr(everything, "broadcast_object_list", lambda values: values)
    with pytest.raises(ValueError, match="seen"):
        everything.attempt(COMMANDS["dice"], options, None, None)
    assert not State.waited  # there the others are at work
    assert everything.attempt(COMMANDS["privacy"], options, None, None) == "seen" and State.waited == 1


def test_all_generates_first(tmp_path):
    """Of the training split's masks alone; another time nothing is made again."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    for number in range(4):
        labels = labels_of(SHAPE, number)
        image = nib.Nifti1Image((labels * 40 + 10).astype(np.float32), np.eye(4))
        for kind, one in (("images", image), ("labels", nib.Nifti1Image(labels, np.eye(4)))):
            (tmp_path / kind).mkdir(exist_ok=True)
            nib.save(one, tmp_path / kind / f"case_{number}.nii.gz")
    rows = [f"case_{n},{'test' if n > 1 else 'train'}" for n in range(4)]
    (tmp_path / "table.csv").write_text("\n".join(["volume,split", *rows]) + "\n")
    section = {"root": str(tmp_path), "table": "table.csv", "split": "split", "images": "images/{volume}.nii.gz"}
    section |= {"masks": "labels/{volume}.nii.gz", "label_names": {0: "background", 2: "anterior", 5: "posterior"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": section}))
    args = ["all", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "page"), "--parts", "dice"]
    args += [
        "--device",
        "cpu",
        "--precision",
        "no",
        "--set",
        "dice.seeds=1",
        "dice.iterations=1",
        "dice.shape=16 16 16",
    ]
    with pytest.raises(ValueError, match="--synthetic is missing: .*--pipeline to generate them"):
        evaluate.main(args)
    evaluate.main([*args, "--pipeline", str(tmp_path / "pipeline"), "--count", "2"])
    made = sorted((tmp_path / "page/generated").glob("*.nii.gz"))
    assert [path.name for path in made] == [f"case_{n}_{k:03d}.nii.gz" for n in range(2) for k in range(2)]
    report, times = json.loads((tmp_path / "page/dice.json").read_text()), [path.stat().st_mtime_ns for path in made]
    assert report["volumes"]["synthetic"] == 4 and (tmp_path / "page/report.html").is_file()
    evaluate.main([*args, "--pipeline", str(tmp_path / "pipeline"), "--count", "2"])
    assert [path.stat().st_mtime_ns for path in made] == times
    assert json.loads((tmp_path / "page/dice.json").read_text())["date"] == report["date"]
