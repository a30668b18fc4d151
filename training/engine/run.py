"""Start and end of a run, in an output folder that no other job writes to meanwhile."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from cli.stopping import stoppable
from files.atomic import remove_leftovers
from files.locks import only_writer
from files.writable import check_output_folder

from .averages.snapshots import SNAPSHOTS
from .checkpoints import list_checkpoints
from .config import LoopConfig, RunConfig, save_config
from .loop import Loop
from .output import refuse_links
from .precision import resolve_precision
from .processes import check_together, how_to_resume, on_cpu, report_peer_failure
from .sharding import check_sharding
from .step import Training
from .tracking import LOGS, choose_trackers, start_trackers
from .validation.best import BEST

Config = TypeVar("Config", bound=RunConfig)
logger = logging.getLogger("training")
CHECKPOINTS = "checkpoints"
PREVIEWS = "previews"
WRITTEN = (
    CHECKPOINTS,
    PREVIEWS,
    LOGS,
    BEST,
    SNAPSHOTS,
    "latents",
    "vae",
    "pipeline",
    "lora",
)  # folders in a run's output


def run_training(
    config: Config, build: Callable[[Config, Accelerator], Training], script: str, args: Sequence[str] | None = None
) -> dict[str, float]:
    """Train as `config` says. Returns the metrics of the final validation; none if the model has no parameters.

    Args:
        build: makes the model's part of the run, in every process.
        script, args: the command line, for the message how to resume (`how_to_resume`).
    Raises: as `open_run`, `build` and `Loop.run`.
    """
    with open_run(config, script, args) as accelerator:
        training = build(config, accelerator)
        metrics: dict[str, float] = {}
        if training.step is not None:
            data = (training.data, training.validation, training.collate, training.contents)
            metrics = Loop(accelerator, config, training.step, *data).run()
        elif accelerator.is_main_process:
            save_config(config, Path(config.output) / "config.yaml")
        if training.measure is not None:
            training.measure()
        if accelerator.is_main_process:
            training.finish()
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return metrics


@contextmanager
def open_run(config: RunConfig, script: str, args: Sequence[str] | None) -> Iterator[Accelerator]:
    """Start the run of `config`, in each of its processes. Until the end of the block no other job writes to its
    output.

    Args:
        script, args: the command line, for the message how to resume (`how_to_resume`).
    Yields: `make_accelerator`, with trackers that have started.
    Raises: as `make_accelerator`; OutputInUse if another job writes to the output for longer than
        `config.wait_minutes`; ValueError if a folder to write to is a link, and if a tracker does not start.
    """
    accelerator = make_accelerator(config)
    with (
        report_peer_failure(accelerator),
        stoppable(how_to_resume(script, args)),
        hold_output(accelerator, config),
    ):
        start_trackers(accelerator, config.loop)
        yield accelerator


@contextmanager
def hold_output(accelerator: Accelerator, config: RunConfig) -> Iterator[None]:
    """Lock the run's output until the end of the block, and remove leftovers of killed runs. The main process does it;
    an error is raised in every process."""
    output = Path(config.output)
    with ExitStack() as stack:
        refused: list[Exception | None] = [None]
        if accelerator.is_main_process:
            try:
                stack.enter_context(only_writer(output, config.wait_minutes))
                refuse_older_run(config)  # of the job that this one waited for
                refuse_links([output / name for name in WRITTEN])
                refuse_links((output / CHECKPOINTS).glob("*"))
                refuse_links((output / SNAPSHOTS).glob("*"))
                remove_leftovers(output)
                for folder in (output / CHECKPOINTS, output / PREVIEWS, output / SNAPSHOTS):
                    if folder.exists():  # from an older run, perhaps of another user
                        check_output_folder(folder)
                        remove_leftovers(folder)
            except (OSError, ValueError) as error:
                refused = [error]
        broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        yield


def refuse_older_run(config: RunConfig) -> None:
    """Raises: ValueError if the output holds a run that is not to be resumed."""
    if config.resume is None and list_checkpoints(Path(config.output) / CHECKPOINTS):
        raise ValueError(
            f"{config.output} already holds a run; continue it with --resume latest, or choose another --output"
        )


def make_accelerator(config: RunConfig) -> Accelerator:
    """Set up Accelerate for the run of `config` (reads `loop`, `output`, `resume` and `wait_minutes`). Creates only the
    output folder.

    Raises: ValueError if the output folder cannot be written to, or holds a run that is not to be resumed; if processes
        do not know of each other; for an Accelerate config of FSDP or DeepSpeed, and where `loop.fsdp` cannot run; for
        a tracker that is unknown or not installed; for `loop.compile` where torch.compile does not work.
    """
    options: LoopConfig = config.loop
    refuse_older_run(config)
    check_output_folder(Path(config.output))
    precision = resolve_precision(options.mixed_precision)
    trackers = choose_trackers(options, config.output)
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=options.timeout_minutes))
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=precision,
        log_with=trackers,
        project_dir=config.output,
        kwargs_handlers=[timeout],
    )
    check_together(accelerator.num_processes)
    if accelerator.num_processes > 1 and config.wait_minutes >= options.timeout_minutes:
        raise ValueError(
            f"wait_minutes {config.wait_minutes:g} must be below loop.timeout_minutes {options.timeout_minutes:g}, "
            "because the other processes wait for the first one no longer than that; raise loop.timeout_minutes"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type} in Accelerate's launch config is not supported. Launch with plain data "
            "parallelism (configs/accelerate/eight_gpus.yaml), and shard the weights with --loop.fsdp true"
        )
    if options.fsdp:
        check_sharding(accelerator, compile=options.compile)
    if options.compile:
        check_compiler(accelerator.device)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    return accelerator


def check_compiler(device: torch.device) -> None:
    """Compile one line of code, before the data are read. Raises: ValueError where torch.compile does not work."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # many kinds: no compiler, one that fails, no Triton
        raise ValueError(
            f"loop.compile: torch.compile does not work here ({str(error).strip().splitlines()[0]}); install a C++ "
            "compiler such as g++, or set loop.compile: false"
        ) from error
