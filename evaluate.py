"""Judge a model:

python evaluate.py reconstruction --config configs/hippocampus/vae.yaml --vae weights/hippocampus --output out/reconstruction.json
python evaluate.py realism --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/realism.json
python evaluate.py privacy --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/privacy.json
python evaluate.py dice --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/dice.json
python evaluate.py conditions --config configs/adrenal_shapes/ldm.yaml --column diagnosis --synthetic out/generated \
    --output out/conditions.json
python evaluate.py report out/realism.json out/privacy.json out/dice.json --output out/page
python evaluate.py all --config configs/hippocampus/ldm.yaml --synthetic out/generated --parts realism privacy dice --output out/page

`--config` names a training config, of which only the section `data` is read; `--data.root DIR` and the like override it.
Reports are JSON and say what they were measured on; docs/evaluation.md says what the figures mean. The commands are in
evaluation/commands/, and `python evaluate.py COMMAND --help` lists the options of each.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from evaluation.commands import COMMANDS
from evaluation.commands.common import make_parser
from evaluation.report import read_config
from training import resolve_precision


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run one evaluation (default: as the command line says), write its report and return it."""
    values = parse(args)
    command = COMMANDS[values.pop("subcommand")]
    options = values[command.NAME]
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if resolve_precision(options.get("precision", "no")) == "bf16" else None
    return command.run(options, device, dtype)


def parse(args: list[str] | None) -> Namespace:
    """The command line, with the data section of `--config` as the defaults of `--data.*`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(args)[0].config
    data = read_config(config)["data"] if config else None
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, make_parser(command, data), help=command.HELP)
    parsed = parser.instantiate(parser.parse_args(args))
    assert isinstance(parsed, Namespace)
    return parsed


if __name__ == "__main__":
    main()
