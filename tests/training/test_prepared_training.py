"""Trainings on prepared volumes: in a cache that holds a part of them, and in two processes that share the work."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_vae
from benchmarks import forked
from benchmarks.cohort import Cohort, parse, stored_bytes
from benchmarks.processes import DATA, LDM, LOOP, VAE

ROOT = Path(__file__).resolve().parents[2]
WIDE = ["--data.phantom={count: 10, shape: [88, 84, 84]}", "--data.validation_fraction=0.1", "--crops.shape=[16,16,16]"]
MODEL = "{class: autoencoder.AutoencoderKL3D, patch_size: 8, channels: [8], strides: [], encoder_blocks: [1], "
MODEL += "decoder_blocks: [1]}"
STEPS = ["--loop.max_steps=6", "--loop.batch_size=2", "--optimizer.warmup_steps=1"]
# Notes which volumes each process prepares.
NOTED = """
import os, sys, time
import train_ldm, train_vae
from volumes.prepared import preparation
original = preparation.prepare_unscaled
def prepare_unscaled(case, config):
    with open(sys.argv[2] + "." + os.environ["RANK"], "a") as file:
        file.write(case.name + "\\n")
    time.sleep(0.1)
    return original(case, config)
preparation.prepare_unscaled = prepare_unscaled
{"train_vae": train_vae, "train_ldm": train_ldm}[sys.argv[1]].main(sys.argv[3:])
"""


def losses_of(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_training_in_a_limited_cache_is_the_same(tmp_path, monkeypatch, caplog):
    """Of volumes that take three times as much: losses and weights to the bit, and the cache is never above."""
    limit = 10_000_000
    for name in ("whole", "limited"):
        cache = tmp_path / f"{name}_cache"
        monkeypatch.setenv("MEDVOLUME_CACHE", str(cache))
        if name == "limited":
            monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{limit} B")
        sizes, done = [], threading.Event()

        def watch(sizes=sizes, done=done, cache=cache) -> None:
            while not done.wait(0.005):
                sizes.append(stored_bytes(cache))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            train_vae.main([*VAE, *WIDE, *LOOP, *STEPS, f"--model={MODEL}", f"--output={tmp_path / name}"])
        finally:
            done.set()
            watcher.join()
        assert max(sizes) > 3 * limit if name == "whole" else 0.6 * limit < max(sizes) <= limit
    assert "the 9 volumes take" in caplog.text and "some are prepared again" in caplog.text
    losses = [losses_of(tmp_path / name) for name in ("whole", "limited")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 6
    (one,), (other,) = ((tmp_path / name / "vae").glob("*.safetensors") for name in ("whole", "limited"))
    weights, same = load_file(one), load_file(other)
    assert weights.keys() == same.keys() and all(weights[key].equal(same[key]) for key in weights)
    configs = [json.loads((tmp_path / name / "vae/config.json").read_text()) for name in ("whole", "limited")]
    assert configs[0]["latents_std"] == configs[1]["latents_std"]


@pytest.mark.slow
def test_two_processes_of_torchrun_prepare_a_share_each(tmp_path):
    """And have the losses of one process, which prepared all."""
    data = [*DATA, "--data.phantom={count: 20, shape: [16, 16, 16]}", *LOOP, "--loop.max_steps=4"]
    (tmp_path / "noted.py").write_text(NOTED)
    for script, options in (("train_vae", VAE), ("train_ldm", [*LDM, f"--vae={tmp_path}/train_vae/vae"])):
        common = [*options, *data, "--optimizer.warmup_steps=2"]
        forked.run(
            script,
            [*common, "--loop.batch_size=4", f"--output={tmp_path / script}"],
            tmp_path / f"{script}.txt",
            MEDVOLUME_CACHE=str(tmp_path / "alone"),
        )
        cache, both, noted = tmp_path / f"{script}_cache", tmp_path / f"{script}_both", tmp_path / f"{script}_noted"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(tmp_path / "noted.py"), script, str(noted), *common, "--loop.batch_size=2", f"--output={both}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEDVOLUME_CACHE": str(cache)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        shares = [Path(f"{noted}.{rank}").read_text().split() for rank in range(2)]
        assert len(set(shares[0] + shares[1])) == len(shares[0]) + len(shares[1]) == 20 and min(map(len, shares)) >= 2
        assert losses_of(both) == pytest.approx(losses_of(tmp_path / script), rel=1e-4)
        assert len(set(losses_of(both))) == 4


@pytest.mark.slow
def test_the_benchmark_of_a_cohort_reports_what_it_measures(tmp_path):
    """Preparation and one training of a few phantoms, in a cache that holds two of them."""
    options = parse(["--cases", "6", "--processes", "1", "--steps", "2", "--output", str(tmp_path / "report.json")])
    cohort = Cohort(tmp_path / "cohort", 6, (24, 16, 16), "70 kB", options)
    assert cohort.prepare() > 0
    found, sizes = cohort.train("train_vae"), cohort.sizes()
    assert sizes["prepared"] == 6 * 24 * 16 * 16 * 5 and sizes["limit"] == 70_000
    assert isinstance(sizes["largest_cache"], int) and 30_000 < sizes["largest_cache"] <= 70_000
    assert isinstance(found["losses"], list) and len(set(found["losses"])) == 2
    assert isinstance(found["seconds_a_step"], list) and len(found["seconds_a_step"]) == 1
