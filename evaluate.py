r"""Evaluate a model or the volumes that it generated:

    python evaluate.py reconstruction --config configs/hippocampus/vae.yaml --vae weights/hippocampus \
        --output out/reconstruction.json
    python evaluate.py realism --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/realism.json
    python evaluate.py privacy --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/privacy.json
    python evaluate.py dice --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/dice.json
    python evaluate.py conditions --config configs/adrenal_shapes/ldm.yaml --column diagnosis \
        --synthetic out/generated --output out/conditions.json
    python evaluate.py adherence --config configs/brain_t1/ldm.yaml --synthetic out/brains --output out/adherence.json
    python evaluate.py report out/realism.json out/privacy.json out/dice.json --output out/page
    python evaluate.py all --config configs/hippocampus/ldm.yaml --synthetic out/generated \
        --parts realism privacy dice --output out/page
    python evaluate.py all --config configs/hippocampus/ldm.yaml --pipeline weights/hippocampus \
        --output out/page                               # generates the volumes first
    torchrun --nproc_per_node 2 evaluate.py dice ...    # `accelerate launch` works too

`--config` is a training config; only its section `data` is read. Options such as `--data.root DIR` override it. `python
evaluate.py COMMAND --help` lists the options of a command. Reports are JSON and record the data and the machine;
docs/evaluation.md explains the figures. Under torchrun, dice, few_labels and pretrain split their trainings across
processes; other commands run in the main process.
"""

from datetime import timedelta
from pathlib import Path

from jsonargparse import Namespace

from cli.command import run_command
from evaluation.commands import COMMANDS
from evaluation.commands.arguments import make_parser
from evaluation.report import read_config
from volumes.data.config_parser import ConfigParser, config_files


def parse(args: list[str] | None) -> Namespace:
    """Parse the command line. The section `data` of `--config` gives the defaults of `--data.*`."""
    files = config_files(args)
    data = read_config(files[-1].path)["data"] if files else None
    parser = ConfigParser(description=__doc__)
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

from cli.stopping import stoppable
from evaluation.commands import run_all
from evaluation.commands.common import check_first, lock_folder
from evaluation.commands.common import run_command as run_evaluation
from pipelines import SamplingConfig
from pipelines.batch_generation import BatchConfig, generate_to_disk
from training import join_processes, report_peer_failure, resolve_precision
from volumes.devices import find_device

# How long processes wait for each other: for the longest training, or for work of the main process alone.
MAX_WAIT = timedelta(days=2)
LEARNING = ("train", "validation")  # the splits that a model may have learned from


def main(args: list[str] | None = None) -> dict[str, object]:
    """Run one command, write its report and return it. `args` is the command line (None: of this process)."""
    values = parse(args)
    command = COMMANDS[values.pop("subcommand")]
    options = values[command.name]
    state = join_processes(MAX_WAIT)
    default = str(state.device) if torch.cuda.is_available() else "cpu"
    device = find_device(options.get("device") or default)
    precision = resolve_precision(options.get("precision", "no"))
    remedy = "run the same command again: it resumes from what is finished"
    with report_peer_failure(state, remedy), stoppable(remedy), lock_folder(command, options):
        if command.name == "all" and options.pipeline and not options.synthetic:
            # Report mistakes, and parts that cannot be measured, before hours of generation.
            planned = options.clone()
            planned.synthetic = [str(Path(options.output) / "generated")]
            run_all.plan(planned)
            if state.is_main_process:
                check_first(command, options)
            options.synthetic = [str(generate_volumes(options, precision, state))]
        report = run_evaluation(command, options, device, torch.bfloat16 if precision == "bf16" else None)
    state.destroy_process_group()
    return report


def generate_volumes(options: Namespace, precision: str, state: PartialState) -> Path:
    """Generate volumes from the masks and conditions of all cases but the test split's, in the folder `generated` of
    the report. Finished volumes are kept.

    Raises: ValueError for data whose masks are not files, and for volumes that were rejected too often.
    """
    folder = Path(options.output) / "generated"
    batch = BatchConfig(
        pipeline=options.pipeline,
        data=options.data,
        splits=LEARNING,
        output=folder,
        count=options.count,
        sampling=SamplingConfig(guidance_scale=options.guidance_scale),
        precision=precision,
    )
    rejected = generate_to_disk(batch, state)
    if rejected:
        raise ValueError("volumes that were rejected too often, and not written:\n" + "\n".join(rejected))
    return folder
