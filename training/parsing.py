"""Configs from YAML files and the command line."""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cli.command import ArgumentParser
from cli.parsing import parse_settings
from cli.settings import construct, faults_of, hints_of, refuse
from files.documents import read_yaml
from volumes.data.config_parser import ConfigParser, config_files
from volumes.data.preprocessing import inherited

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


def read_section(owner: Any, sections: Mapping[str, Any], name: str) -> Any:
    """One section of a plain config as its dataclass, with the defaults of what is left out; None if it may be absent and is.

    Args:
        owner: the config's class, TrainVaeConfig or TrainLdmConfig; or one of its sections' dataclasses.
        sections: as a YAML file has them.
    Raises: ValueError for values that are not what they are declared to be.
    """
    hint = hints_of(owner)[name]
    values = sections.get(name)
    if values is None:
        field_ = next(one for one in dataclasses.fields(owner) if one.name == name)
        return field_.default_factory() if field_.default_factory is not dataclasses.MISSING else field_.default
    refuse(faults_of(hint, values, name, raw=True))
    return construct(hint, values, name)
