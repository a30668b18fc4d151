"""docs/cluster.md: its commands, its figures, and the plan that they are computed by."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import evaluate
import generate
import prepare
import train_ldm
import train_vae
from autoencoder import AutoencoderKL3D
from benchmarks import stages
from benchmarks.cluster_plan import Costs, Job, plan
from benchmarks.phantom_set import write_phantoms
from diffusion import LatentUNet3D, make_scheduler
from files import cache
from files.documents import read_object
from pipelines import MedVolumePipeline
from tools import cluster_page
from training import Learner, OptimizerConfig
from training.engine import checkpoints
from volumes import DataConfig, VolumeDataset, describe, load_cases

ROOT = Path(__file__).resolve().parents[2]
TEXT = cluster_page.PAGE.read_text()
PARSERS = {
    "medvolume prepare": prepare.parse,
    "medvolume generate": generate.make_parser().parse_args,
    "generate.py": generate.make_parser().parse_args,
    "train_vae.py": train_vae.parse,
    "train_ldm.py": train_ldm.parse,
    "medvolume evaluate": evaluate.parse,
    "python -m benchmarks.stages": stages.parse,
    "python -m tools.cluster_page": cluster_page.parse,
}
COSTS: Costs = {
    "prepare": {"seconds": 2.0, "read_bytes": 10.0, "stored_bytes": 20.0},
    "latents": {"seconds": 1.0, "version_seconds": 3.0, "bytes": 5.0},
    "versions": 4,
    "vae_step": {
        "seconds": 0.5,
        "batch": 2,
        "passes": 3.2,
        "gradient_bytes": 160,
        "checkpoint_bytes": 600,
        "precision": "no",
    },
    "ldm_step": {
        "seconds": 0.25,
        "batch": 5,
        "passes": 8.0,
        "gradient_bytes": 320,
        "checkpoint_bytes": 700,
        "precision": "bf16",
    },
    "generate": {"seconds": 4.0, "bytes": 7.0},
    "evaluate": {"seconds": 0.1},
    "pipeline_bytes": 900,
}


def commands() -> list[tuple[str, list[str]]]:
    """The commands of the page's scripts, each with its program and its words."""
    scripts = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    found = []
    for line in scripts.splitlines():
        for program in PARSERS:
            before, named, rest = line.partition(f"{program} ")
            if named and not before.endswith("/"):
                found.append((program, rest))
    values = {"RECIPE": "recipe", "GENERATED": "generated", "SLURM_ARRAY_TASK_ID": "7"}
    plain = [(program, re.sub(r"\$(\w+)", lambda m: values[m[1]], rest.rstrip("'"))) for program, rest in found]
    return [(program, shlex.split(rest)) for program, rest in plain]


def test_every_command_is_one_that_its_program_takes(tmp_path, monkeypatch):
    """With a recipe in place, the parsers check values too."""
    found = commands()
    assert {program for program, _ in found} == PARSERS.keys() and len(found) == 9
    shutil.copytree(ROOT / "configs/hippocampus", tmp_path / "recipe")
    monkeypatch.chdir(tmp_path)
    for program, words in found:
        PARSERS[program](words)
        with pytest.raises((SystemExit, ValueError)):
            PARSERS[program]([*words, "--no_such_option", "1"])


def test_what_it_names_is_there():
    named = set(re.findall(r"configs/[\w/]+\.yaml", TEXT)) | set(re.findall(r"benchmarks/\w+\.py", TEXT))
    assert len(named) == 3 and [name for name in named if not (ROOT / name).is_file()] == []
    assert set(re.findall(r"MEDVOLUME_\w+", TEXT)) == {"MEDVOLUME_CACHE", cache.LIMIT}
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and [link for link in links if not (ROOT / "docs" / link).is_file()] == []
    assert "(cluster.md)" in (ROOT / "docs/many_machines.md").read_text()


def test_the_page_is_up_to_date():
    said = "docs/cluster.md is stale: run `python -m tools.cluster_page`"
    reports = [read_object(ROOT / f"docs/{name}.json") for name in ("stages", "processes")]
    assert cluster_page.page(*reports) == TEXT, said
    assert "no GPU has run any of it" in TEXT and reports[0]["device"] == "cpu"


def test_its_plans_are_those_of_its_costs():
    report: Any = read_object(ROOT / "docs/stages.json")
    assert [one["gpus"] for one in report["plans"]] == [8, 64]
    for one in report["plans"]:
        known = {name: value for name, value in one.items() if name != "job"}
        assert known == plan(report["costs"], Job(**one["job"]))


def test_losses_of_several_processes_are_those_of_one():
    report: Any = read_object(ROOT / "docs/processes.json")
    for script in ("train_vae", "train_ldm"):
        losses = report[script]["losses"]
        assert losses.keys() == cluster_page.RUNS.keys() and len(losses["one"]) == report["steps"]
        for values in losses.values():
            assert values == pytest.approx(losses["one"], rel=1e-4)


def test_a_plan_by_hand():
    found = plan(COSTS, Job(volumes=1000, generated=200, gpus=16, gpus_per_node=8, processes=4, kept=2))
    assert found["nodes"] == 2
    assert found["steps"] == {"train_vae": 100, "train_ldm": 100}  # 3,200 / (2 x 16), 8,000 / (5 x 16)
    seconds = {"prepare": 500, "train_vae": 50, "latents": 625, "train_ldm": 25, "generate": 50, "evaluate": 120}
    assert found["seconds"] == pytest.approx({**seconds, "total": 1370})
    assert found["shared"] == {"source": 10_000, "latents": 20_000, "generated": 1400}
    assert found["node"] == {"copies": 10_000, "prepared": 20_000, "latents": 20_000, "total": 50_000}
    assert found["run"] == {"vae_checkpoints": 1800, "ldm_checkpoints": 2100, "pipeline": 900}
    # 2 x 15/16 of the gradients in each step: 300 bytes in 0.5 s, 600 in 0.25 s
    network = {"download": 30_000, "upload": 10_700, "train_vae_per_second": 600, "train_ldm_per_second": 2400}
    assert found["network"] == network


def test_a_plan_of_one_node_needs_no_network_between_nodes():
    found = plan(COSTS, Job(volumes=1001, generated=1, gpus=3))
    assert found["nodes"] == 1 and found["steps"]["train_vae"] == 534  # 3,203.2 / 6, and the rest
    assert found["network"]["train_vae_per_second"] == found["network"]["train_ldm_per_second"] == 0
    free = {**COSTS, "vae_step": {**COSTS["vae_step"], "seconds": 0.0, "passes": 0.0}}
    found = plan(free, Job(volumes=1000, generated=1, gpus=16))  # pyright: ignore[reportArgumentType]
    assert found["steps"]["train_vae"] == found["network"]["train_vae_per_second"] == 0


def test_figures_are_written_as_people_say_them():
    times = [cluster_page.duration(seconds) for seconds in (0, 119, 120, 7199, 7200, 172_799, 172_800)]
    assert times == ["0 s", "119 s", "2 min", "120 min", "2.0 h", "48.0 h", "2.0 days"]
    assert [cluster_page.size(n) for n in (500, 2.5e6, 3.21e9, 4e12)] == ["0.5 kB", "2.5 MB", "3.21 GB", "4 TB"]


@pytest.fixture
def recipe(tmp_path):
    """A recipe of tiny models on phantoms, with a pipeline of them, untrained."""
    section = write_phantoms(tmp_path / "set", range(5), tests=1)
    vae = {"channels": [4, 8], "latent_channels": 2, "encoder_blocks": [0, 0], "decoder_blocks": [0, 0]}
    unet = {"channels": [8], "strides": [], "blocks": [1], "attention": [False], "mask_width": 4}
    loop = {"max_steps": 12, "batch_size": 2, "mixed_precision": "no"}
    settings = {
        "vae": {"model": {"class": "autoencoder.AutoencoderKL3D", **vae}, "crops": {"shape": [8, 8, 8]}},
        "ldm": {"model": {"class": "diffusion.LatentUNet3D", **unet}, "vae": "vae", "cache": {"versions": 3}},
    }
    settings["ldm"]["cache"]["flip_axes"] = [0]
    for name, sections in settings.items():
        whole = {"output": "out", "data": {**section, "validation_fraction": 0.0}, "loop": loop, **sections}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    config = DataConfig(**{**section, "validation_fraction": 0.0})
    dataset = VolumeDataset([case for case in load_cases(config) if case.split == "train"], config)
    coder = AutoencoderKL3D(**vae)
    coder.set_latent_statistics([0.0] * 2, [1.0] * 2)
    network = LatentUNet3D(in_channels=2, out_channels=2, num_labels=dataset.num_labels, **unet)
    pipe = MedVolumePipeline(coder, network, make_scheduler("rectified_flow"), data=describe(dataset))
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path, dataset


def test_the_stages_of_a_recipe_are_measured(recipe, monkeypatch):
    folder, dataset = recipe
    before = cache.cache_root()
    args = ["--recipe", str(folder), "--pipeline", str(folder / "pipeline"), "--output", str(folder / "stages.json")]
    args += ["--volumes", "3", "--steps", "2", "--planned_volumes", "100", "--generated", "50", "--gpus", "4", "16"]
    report = stages.main(args)
    assert read_object(folder / "stages.json") == report and cache.cache_root() == before
    costs = report["costs"]
    sizes = [path.stat().st_size for kind in ("images", "labels") for path in sorted((folder / "set" / kind).iterdir())]
    assert costs["prepare"]["read_bytes"] == pytest.approx(sum(sizes[:3] + sizes[5:8]) / 3)
    assert costs["prepare"]["stored_bytes"] == sum(facts.nbytes for facts in dataset.facts[:3]) / 3
    # 12 steps of 2 on 4 training volumes; mean and std of 2 x 4^3 latents in float32, 18^3 or 16^3 labels of 2 bytes
    steps = [costs["vae_step"], costs["ldm_step"]]
    assert [(one["batch"], one["passes"]) for one in steps] == [(2, 6.0), (2, 6.0)]
    assert costs["versions"] == 3 and costs["latents"]["bytes"] > 2 * 2 * 4**3 * 4 + 16**3 * 2
    assert all(one["checkpoint_bytes"] >= 3 * one["gradient_bytes"] > 0 for one in steps)
    assert costs["generate"]["bytes"] > 1000 and report["shape"] == [16, 16, 16] and report["volumes"] == 3
    timed = [*steps, costs["prepare"], costs["latents"], costs["generate"], costs["evaluate"]]
    assert all(one["seconds"] > 0 for one in timed)
    assert [one["gpus"] for one in report["plans"]] == [4, 16] and "no GPU has run" in report["note"]
    page = cluster_page.page(report, read_object(ROOT / "docs/processes.json"))
    assert "| 4 GPUs, 1 node | 16 GPUs, 2 nodes |" in page and "100 volumes of this size, 50 to generate" in page
    on_gpu = {**report, "device": "NVIDIA H200"}
    assert "on one NVIDIA H200." in cluster_page.page(on_gpu, read_object(ROOT / "docs/processes.json"))


def test_the_size_of_a_checkpoint_is_that_on_the_disk(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    learner = Learner("net", torch.nn.Linear(700, 600), OptimizerConfig(), ema_decay=0.9, max_steps=9)
    learner.prepare(Accelerator(cpu=True))
    learner.backward(learner.model(torch.randn(2, 700)).square().mean())
    learner.update(0)
    saved = checkpoints.Checkpointer(learner.accelerator, [learner], tmp_path, keep=2).save(checkpoints.TrainState(1))
    AcceleratorState._reset_state(reset_partial_state=True)
    on_disk = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    step: Any = SimpleNamespace(learners=(learner,))
    expected = stages.checkpoint_bytes(step, validated=False)
    assert expected == pytest.approx(on_disk, rel=0.01)
    weights = 4 * sum(weight.numel() for weight in learner.network.parameters())
    assert stages.checkpoint_bytes(step, validated=True) == expected + weights


def test_a_missing_figure_is_named():
    report = read_object(ROOT / "docs/stages.json")
    less = {name: value for name, value in report.items() if name != "date"}
    with pytest.raises(ValueError, match=r"names stages\.date"):
        cluster_page.page(less, read_object(ROOT / "docs/processes.json"))


def test_another_report_is_refused_by_name(tmp_path):
    other = str(ROOT / "docs/processes.json")
    with pytest.raises(
        ValueError, match=r"processes\.json: has no benchmark, costs.*give a report of benchmarks\.stages"
    ):
        cluster_page.main(["--stages", other, "--output", str(tmp_path / "cluster.md")])
    assert not (tmp_path / "cluster.md").exists()
