"""Prepare the volumes of a config before the training: read, check and resample them, and store them in the cache.

    medvolume prepare --config recipe/vae.yaml --processes 8
    MEDVOLUME_CACHE=/scratch/cache MEDVOLUME_CACHE_LIMIT=500GB medvolume prepare --config recipe/vae.yaml

Trainings prepare what is missing themselves; this command does it without a GPU, or on another machine that sees the
same cache. Several may run at once, and a killed one continues. $MEDVOLUME_CACHE_LIMIT bounds prepared volumes, copies
of remote files and copies of remote latents together (docs/prepared_volumes.md). With `--verify` it also compares every
stored volume with its checksum. The exit status is 1 if volumes are refused, which `data.on_error: skip` lists, or
could not be stored.
"""

import logging
from collections.abc import Sequence

from jsonargparse import Namespace

from cli.command import console_program, next_step, run_command
from cli.settings import Number, PositiveInt
from evaluation.report import config_parser


def parse(args: Sequence[str] | None = None) -> Namespace:
    """Parse the command line; the data section of `--config` gives the defaults of `--data.*`."""
    parser = config_parser("prepare", __doc__, args)
    parser.prog = console_program() or "prepare.py"
    parser.add_argument("--processes", type=Number(PositiveInt), default=1, help="processes that share the work (1)")
    parser.add_argument("--verify", action="store_true", help="compare stored volumes with their checksums")
    parsed = parser.instantiate(parser.parse_args(None if args is None else list(args)))
    assert isinstance(parsed, Namespace)
    return parsed


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(parse)

from files.cache import cache_root
from volumes import VolumeError, load_cases
from volumes.prepared.preparation import Ready, prepare_cases
from volumes.prepared.store import PreparedStore


def main(args: Sequence[str] | None = None) -> int:
    """Prepare the volumes that the command line names. Returns 1 if some are refused or not stored, else 0."""
    options = parse(args)
    logging.basicConfig(format="%(message)s")
    cases = load_cases(options.data)
    outcomes = prepare_cases(cases, options.data, processes=options.processes, verify=options.verify)
    ready = [one for one in outcomes if isinstance(one, Ready)]
    for case, one in zip(cases, outcomes, strict=True):
        if isinstance(one, VolumeError):
            print(f"  {case.name}: {one}")
    store = PreparedStore()
    stored = [one for one in ready if store.has_voxels(one.key, one.facts)]
    size = sum(one.facts.nbytes for one in stored) / 2**30
    print(f"{len(stored)} of {len(cases)} volumes are prepared, {size:.3g} GiB in {cache_root()}")
    next_step("train_vae.py", "--config", options.config)
    return int(len(stored) < len(outcomes))
