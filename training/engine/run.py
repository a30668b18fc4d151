"""The begin and the end of a run: Accelerate as the loop needs it, in an output folder that no other job writes to meanwhile."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from cli.stopping import stoppable
from files.atomic import remove_leftovers
from files.locks import only_writer
from training.config import LoopConfig

from .checkpoints import list_checkpoints
from .output import check_writable, refuse_links
from .precision import resolve_precision
from .processes import check_together, how_to_resume, on_cpu, report_peer_failure
from .sharding import check_sharding
from .trackers import choose_trackers, start_trackers

logger = logging.getLogger("training")
CHECKPOINTS, PREVIEWS = "checkpoints", "previews"
WRITTEN = (CHECKPOINTS, PREVIEWS, "logs", "latents", "vae", "pipeline", "lora")  # folders in a run's output


@contextmanager
def open_run(config: Any, script: str, args: Sequence[str] | None) -> Iterator[Accelerator]:
    """Begin the run that `config` describes, in every process of it: until the end of the block no other job writes to its output.

    Args:
        script, args: of the command line, for the message how to resume (`how_to_resume`).
    Yields: `make_accelerator`, with trackers that have started.
    Raises: as `make_accelerator`; OutputInUse if another job writes to the output for longer than `config.wait_minutes`; ValueError
        for links in the place of what is written, and for a tracker that does not start.
    """
    accelerator = make_accelerator(config)
    with (
        report_peer_failure(accelerator),
        stoppable(how_to_resume(script, args)),
        hold_output(accelerator, config),
    ):
        start_trackers(accelerator, config.loop.trackers)
        yield accelerator


@contextmanager
def hold_output(accelerator: Accelerator, config: Any) -> Iterator[None]:
    """Hold the run's output until the end of the block, and tidy up what killed runs left there. The main process does it, and the
    others hear of its refusal."""
    output = Path(config.output)
    with ExitStack() as stack:
        refused: list[Exception | None] = [None]
        if accelerator.is_main_process:
            try:
                stack.enter_context(only_writer(output, config.wait_minutes))
                refuse_older_run(config)  # of a job that was waited for
                refuse_links([output / name for name in WRITTEN])
                refuse_links((output / CHECKPOINTS).glob("*"))
                remove_leftovers(output)
                for folder in (output / CHECKPOINTS, output / PREVIEWS):
                    if folder.exists():  # of an older run, and perhaps of another user
                        check_writable(folder)
                        remove_leftovers(folder)
            except (OSError, ValueError) as error:
                refused = [error]
        broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        yield


def refuse_older_run(config: Any) -> None:
    """Raises: ValueError if the output holds a run, and nothing says to resume it."""
    if config.resume is None and list_checkpoints(Path(config.output) / CHECKPOINTS):
        raise ValueError(f"{config.output} already holds a run; go on with --resume latest, or choose another --output")


def make_accelerator(config: Any) -> Accelerator:
    """Accelerate as the loop needs it, for the run that `config` describes (`loop`, `output`, `resume` and `wait_minutes` are read).
    Nothing is written but the output folder itself.

    Raises: ValueError if the output folder cannot be written to, or holds another run and nothing says to resume it; for
    processes that do not know of each other; for an Accelerate config of FSDP or DeepSpeed, and for `loop.fsdp` where it
    cannot run; for a tracker that is unknown or not installed; for
    `loop.compile` on a machine that cannot.
    """
    options: LoopConfig = config.loop
    refuse_older_run(config)
    check_writable(Path(config.output))
    precision = resolve_precision(options.mixed_precision)
    trackers = choose_trackers(options.trackers, config.output) or None
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=options.timeout_minutes))
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=precision,
        log_with=trackers,
        project_dir=config.output,
        kwargs_handlers=[patience],
    )
    check_together(accelerator.num_processes)
    if accelerator.num_processes > 1 and config.wait_minutes >= options.timeout_minutes:
        raise ValueError(
            f"wait_minutes {config.wait_minutes:g} must be below loop.timeout_minutes {options.timeout_minutes:g}: the other "
            "processes wait for the first one no longer; raise loop.timeout_minutes"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type}: of Accelerate's launch config is not supported. Launch with plain data parallelism "
            "(configs/accelerate/eight_gpus.yaml) and --loop.fsdp true, which divides the weights by itself"
        )
    if options.fsdp:
        check_sharding(accelerator, compile=options.compile)
    if options.compile:
        check_compiler(accelerator.device)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    return accelerator


def check_compiler(device: torch.device) -> None:
    """Compile a line of code, before data are read. Raises: ValueError where torch.compile does not work."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Triton
        raise ValueError(
            f"loop.compile: torch.compile does not work here ({str(error).strip().splitlines()[0]}); install a C++ "
            "compiler such as g++, or set loop.compile: false"
        ) from error
