"""The training loop and what belongs to it: configs, learners, checkpoints. It knows Accelerate and no model."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .build import build_model, initialize_from
    from .config import (
        AdversarialConfig,
        AutoencoderLosses,
        CropConfig,
        LatentCacheConfig,
        LoopConfig,
        OptimizerConfig,
        PerceptualConfig,
        TrainLdmConfig,
        TrainVaeConfig,
        config_changes,
        parse_config,
        save_config,
    )
    from .engine.checkpoints import (
        Checkpointer,
        DamagedCheckpoint,
        TrainState,
        find_checkpoint,
        list_checkpoints,
    )
    from .engine.ema import MovingAverage
    from .engine.learner import Learner, learning_rate
    from .engine.loop import Loop, TrainingStep
    from .engine.output import save_model
    from .engine.precision import native_bf16, resolve_precision
    from .engine.processes import how_to_resume, join_processes, report_peer_failure
    from .engine.run import make_accelerator, open_run
    from .engine.sampling_order import ResumableBatchSampler, derive_seed

__all__ = [
    "AdversarialConfig",
    "AutoencoderLosses",
    "Checkpointer",
    "DamagedCheckpoint",
    "CropConfig",
    "LatentCacheConfig",
    "Learner",
    "Loop",
    "LoopConfig",
    "MovingAverage",
    "OptimizerConfig",
    "PerceptualConfig",
    "ResumableBatchSampler",
    "TrainLdmConfig",
    "TrainState",
    "TrainVaeConfig",
    "TrainingStep",
    "build_model",
    "config_changes",
    "derive_seed",
    "report_peer_failure",
    "find_checkpoint",
    "how_to_resume",
    "initialize_from",
    "join_processes",
    "learning_rate",
    "list_checkpoints",
    "make_accelerator",
    "native_bf16",
    "open_run",
    "parse_config",
    "resolve_precision",
    "save_config",
    "save_model",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
