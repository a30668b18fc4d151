"""Judge a model:

python evaluate.py reconstruction --config configs/hippocampus/vae.yaml --vae weights/hippocampus --output out/reconstruction.json
python evaluate.py realism --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/realism.json
python evaluate.py privacy --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/privacy.json
python evaluate.py dice --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/dice.json
python evaluate.py conditions --config configs/adrenal_shapes/ldm.yaml --column diagnosis --synthetic out/generated \
    --output out/conditions.json
python evaluate.py report out/realism.json out/privacy.json out/dice.json --output out/page
python evaluate.py all --config configs/hippocampus/ldm.yaml --synthetic out/generated --parts realism privacy dice --output out/page
python evaluate.py all --config configs/hippocampus/ldm.yaml --pipeline weights/hippocampus --output out/page   # generates first
torchrun --nproc_per_node 2 evaluate.py dice ...    # as `accelerate launch` does on GPUs; trainings are shared out

`--config` names a training config, of which only the section `data` is read; `--data.root DIR` and the like override it.
Reports are JSON and say what they were measured on; docs/evaluation.md says what the figures mean. The commands are in
evaluation/commands/, and `python evaluate.py COMMAND --help` lists the options of each. Of several processes, those of dice,
few_labels and pretrain share the trainings; any other command is the main process's, and the others wait.
"""

import argparse
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from cli.command import run_command
from evaluation.commands import COMMANDS
from evaluation.commands.arguments import make_parser
from evaluation.report import read_config
from volumes.data.config_parser import ConfigParser, config_files


def parse(args: list[str] | None) -> Namespace:
    """The command line, with the data section of `--config` as the defaults of `--data.*`."""
    files = config_files(args)
    data = read_config(files[-1])["data"] if files else None
    parser = ConfigParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, make_parser(command, data), help=command.help)
    parsed = parser.instantiate(parser.parse_args(args))
    assert isinstance(parsed, Namespace)
    return parsed


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import torch
from accelerate import PartialState

import generate
from cli.stopping import stoppable
from evaluation.commands import run_all as everything
from evaluation.commands.common import check_first, holding_folder
from evaluation.commands.common import run_command as run_evaluation
from evaluation.data.label_budget import write_masks
from evaluation.data.pairs import learning_cases
from training import join_processes, report_peer_failure, resolve_precision
from volumes import load_cases
from volumes.devices import find_device

MAX_WAIT = timedelta(days=2)  # of processes for each other: for the longest training, or what one does alone


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run one evaluation (default: as the command line says), write its report and return it."""
    values = parse(args)
    command = COMMANDS[values.pop("subcommand")]
    options = values[command.name]
    state = join_processes(MAX_WAIT)
    own = str(state.device) if torch.cuda.is_available() else "cpu"
    device = find_device(options.get("device") or own)
    precision = resolve_precision(options.get("precision", "no"))
    again = "run the same command again: it goes on with what is there"
    with report_peer_failure(state, again), stoppable(again), holding_folder(command, options):
        if command.name == "all" and options.pipeline and not options.synthetic:
            planned = options.clone()
            planned.synthetic = [str(Path(options.output) / "generated")]
            everything.plan(planned)  # what is wrong, and what cannot be measured, before the work
            if state.is_main_process:
                check_first(command, options)  # before hours of generation
            options.synthetic = [str(generate_volumes(options, precision, state))]
        report = run_evaluation(command, options, device, torch.bfloat16 if precision == "bf16" else None)
    state.destroy_process_group()
    return report


def generate_volumes(options: Namespace, precision: str, state: PartialState) -> Path:
    """Volumes of the masks of the training split, in the folder `generated` of the report: those that are not there yet.

    Raises: ValueError for data whose masks are no files.
    """
    folder, config = Path(options.output) / "generated", options.data
    cases = learning_cases(load_cases(config))
    if missing := [case.name for case in cases if case.mask is None]:
        raise ValueError(f"--pipeline: {missing[0]} has no mask in a file to generate from; give --synthetic instead")
    table = folder.with_name("generated_masks.csv")
    if state.is_main_process:
        write_masks(cases, config, table)
    state.wait_for_everyone()
    arguments = ["--pipeline", options.pipeline, "--conditions", str(table), "--output", str(folder)]
    arguments += [
        "--count",
        str(options.count),
        "--guidance_scale",
        str(options.guidance_scale),
        "--precision",
        precision,
    ]
    if config.label_map:
        arguments += ["--label_map", *(f"{value}={label}" for value, label in config.label_map.items())]
    lost = generate.generate(generate.parse(arguments), state)
    if lost:
        raise ValueError("volumes that were given up:\n" + "\n".join(lost))
    return folder
