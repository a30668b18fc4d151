"""What a recipe's files hold: settings that training accepts, from any working directory, and that train."""

import shlex
from pathlib import Path

import layouts as made
import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState

import generate
import train_ldm
import train_vae
from recipes.__main__ import main
from recipes.proposals.machine import Machine
from recipes.proposals.memory import fit_memory, step_bytes
from recipes.proposals.sizing import Facts, propose
from recipes.proposals.starts import Start
from recipes.recipe import write_recipe
from recipes.report import next_commands, report, written
from recipes.survey import Options, look_over
from recipes.writing import data_yaml
from training.engine.config import parse_config
from training.ldm_config import TrainLdmConfig
from training.vae_config import TrainVaeConfig
from volumes import load_cases
from volumes.data.config import DataConfig

CPU = Machine(2, 16 * 2**30)
LAYOUTS = [
    made.flat, made.pairs, made.patients, made.nnunet, made.decathlon, made.bids, made.totalsegmentator, made.listed,
    made.dicom,
]  # fmt: skip


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_training_accepts_every_recipe(tmp_path, monkeypatch, make):
    survey = look_over(Options(make(tmp_path / "scans"), tmp_path / "recipe", quick=True), CPU)
    write_recipe(survey, "python -m recipes DIR")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    vae = parse_config(TrainVaeConfig, ["--config", str(tmp_path / "recipe/vae.yaml")])
    ldm = parse_config(TrainLdmConfig, ["--config", str(tmp_path / "recipe/ldm.yaml")])
    assert vae.data == ldm.data and len(load_cases(vae.data)) == len(survey.choice.keys)
    assert (tmp_path / "elsewhere" / vae.output).resolve() == tmp_path / "recipe/vae"
    assert (tmp_path / "elsewhere" / ldm.vae).resolve() == tmp_path / "recipe/vae/vae"
    assert vae.crops.shape == tuple(survey.plan.vae["crops"]["shape"])
    assert ldm.loop.max_steps == survey.plan.ldm["loop"]["max_steps"]


@pytest.mark.parametrize("options", [["--classes", "sex"], ["--mask", "none", "--channels", "CT", "--numbers", "age"]])
def test_a_recipe_trains_and_generates(tmp_path, monkeypatch, capsys, options):
    """From scans to volumes by the files that init writes and the commands that it prints."""
    made.patients(tmp_path / "scans")
    monkeypatch.chdir(tmp_path)
    assert main(["scans", "--quick", *options]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.partition("next, in this order:")[2].splitlines()]
    _, _, vae, ldm, generation = commands
    short = ["--loop.max_steps", "2", "--loop.trackers", "[]", "--optimizer.warmup_steps", "0", "--loop.previews", "0"]
    for script, command in ((train_vae, vae), (train_ldm, ldm), (generate, generation)):
        assert command[0] == "python" and Path(command[1]).name == f"{script.__name__}.py"
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main([*command[2:], *(["--steps", "2"] if script is generate else short)])
    held_out = [case for case in load_cases(parse_config(TrainLdmConfig, ldm[2:]).data) if case.split == "test"]
    assert held_out
    for case in held_out:
        for ending in ("_ct", "_pet") if case.mask else ("",):
            assert Path(f"recipe/generated/{case.name}_000{ending}.nii.gz").is_file(), case
    assert Path("recipe/generated/preview.png").is_file()


def test_a_recipe_is_not_replaced_unasked(tmp_path, capsys):
    folder, recipe = made.pairs(tmp_path / "scans"), tmp_path / "recipe"
    arguments = [str(folder), "--quick", "--output", str(recipe)]
    main(arguments)
    (recipe / "vae").mkdir()
    (recipe / "vae/metrics.json").write_text("{}")
    (recipe / "data.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match="holds data.yaml already; add --overwrite"):
        main(arguments)
    assert (recipe / "data.yaml").read_text() == "mine: 1\n"
    main([*arguments, "--overwrite"])
    assert "root" in yaml.safe_load((recipe / "data.yaml").read_text()) and (recipe / "vae/metrics.json").is_file()


def test_the_report_fits_80_columns(tmp_path):
    folder = made.patients(tmp_path / ("a folder with a very long name, as people have them " * 2))
    survey = look_over(Options(folder, tmp_path / "recipe", quick=True), CPU)
    lines = [*report(survey).splitlines(), *written(survey).split("next, in this order")[0].splitlines()]
    assert max(map(len, lines)) <= 79
    text = " ".join(line.strip() for line in lines)
    for said in ("6 cases of 6 subjects", "CT.nii.gz", "tumour", "6 of 6", "sex (F, M)", "--quick", "quality is low"):
        assert said in text, said
    commands = next_commands(survey)
    assert "evaluation.doctor" in commands[0] and "train_vae.py" in commands[1] and "--split test" in commands[3]


def test_odd_names_cannot_break_the_yaml():
    settings = {"root": "../a: b #c", "images": {"ct": "{case}/x: 'y'.nii.gz"}, "label_names": {0: "no", 1: "a\nb: c"}}
    text = data_yaml(settings, {"root": "line\nbreak: 1"}, "python -m recipes 'a\nb: 2'")
    assert yaml.safe_load(text) == settings


def test_plans_are_made_smaller_until_they_fit():
    few = Facts(["image"], ["percentile"], ["background", "a"], np.full((20, 3), 64), [1.0] * 3, 30, 40)
    data = DataConfig(images="{case}.nii.gz", masks="{case}_m.nii.gz", label_names={0: "background", 1: "a"})
    plan = propose(few, CPU, Start(), quick=False)
    needed = step_bytes(plan, few, data, "vae")
    patch, batch = list(plan.vae["crops"]["shape"]), plan.vae["loop"]["batch_size"]
    fit_memory(plan, few, CPU, data)
    assert (plan.vae["crops"]["shape"], plan.vae["loop"]["batch_size"]) == (patch, batch)  # fits as it is
    volumes = 20 * 64**3 * 6
    fit_memory(plan, few, Machine(2, volumes + int(needed / 0.6 / 1.6)), data)
    assert plan.vae["loop"]["batch_size"] < batch and step_bytes(plan, few, data, "vae") <= needed / 1.6
    assert "to fit into memory: batch 1" in plan.why["vae.loop"]
