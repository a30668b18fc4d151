"""Configs from YAML files and the command line."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cli.command import ArgumentParser
from cli.parsing import parse_settings
from cli.settings import construct, faults, hints_of, refuse
from files.documents import read_yaml
from volumes.data.config import DataConfig
from volumes.data.config_parser import ConfigParser, config_files
from volumes.data.preprocessing import inherited

from .ldm_config import TrainLdmConfig
from .vae_config import TrainVaeConfig

Config = TypeVar("Config")


def parse_config(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """Parse the run's config from `--config FILE.yaml` and overrides such as `--loop.max_steps 100`.

    Later arguments override earlier ones, so `--config` comes first. Settings of the preprocessing that `data` does not name are
    those of the autoencoder in `vae` or `init_from` (`volumes.data.preprocessing.inherited`). `--print_config` shows the result.

    Args:
        args: default: the command line.
    Raises: ValueError for a file that is missing or that `read_yaml` refuses, for unknown settings and for values outside
        their declared range, by name.
    """
    args = list(sys.argv[1:] if args is None else args)
    files = config_files(args)
    source = "vae" if "vae" in hints_of(config_class) else "init_from"
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{source}", dest="source")
    folder, section = None, {}
    for path in files:
        settings = read_yaml(path)
        folder = settings.get(source, folder)
        section |= settings["data"] if isinstance(settings.get("data"), dict) else {}
    folder = first.parse_known_args(args)[0].source or folder
    learned = inherited(os.path.expanduser(folder), section) if isinstance(folder, str) else {}
    parser = ConfigParser(description=config_class.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the arguments below")
    parser.add_class_arguments(config_class, as_group=False)
    parser.set_defaults({f"data.{key}": value for key, value in learned.items()})
    return parse_settings(parser, args, {"": config_class}, files).settings


def config_class_of(sections: Mapping[str, object]) -> type[TrainVaeConfig] | type[TrainLdmConfig]:
    """Return which training the sections of a config file are for: that of a diffusion model names its `vae`."""
    return TrainLdmConfig if "vae" in sections else TrainVaeConfig


def config_from_sections(sections: Mapping[str, Any], data: DataConfig) -> TrainVaeConfig | TrainLdmConfig:
    """Build the config of a training from the sections of its YAML file, which may lack `output`.

    Args:
        data: in place of the section `data`.
    Raises: ValueError for values outside their declared range, by name.
    """
    config_class = config_class_of(sections)
    values = {"output": ".", **{name: value for name, value in sections.items() if name != "data"}}
    refuse(faults(config_class, values, raw=True))
    return construct(config_class, {**values, "data": data})
