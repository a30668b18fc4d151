"""Training: the configs, an autoencoder's and a diffusion model's part of a run, and the engine that runs them."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .build import build_model, initialize_from
    from .engine.averages.power import MovingAverage
    from .engine.checkpoints import (
        Checkpointer,
        DamagedCheckpoint,
        TrainState,
        find_checkpoint,
        list_checkpoints,
    )
    from .engine.config import LoopConfig, OptimizerConfig, config_changes, parse_config, save_config
    from .engine.learner import Learner, learning_rate
    from .engine.loop import Loop
    from .engine.output import save_model
    from .engine.precision import native_bf16, resolve_precision
    from .engine.processes import how_to_resume, join_processes, report_peer_failure, run_together
    from .engine.run import make_accelerator, open_run, run_training
    from .engine.sampling_order import ResumableBatchSampler, derive_seed
    from .engine.step import Training, TrainingStep
    from .ldm_config import LoraConfig, TrainLdmConfig
    from .ldm_step import LdmTrainingStep
    from .vae import VaeTrainingStep
    from .vae_config import AdversarialConfig, AutoencoderLosses, CropConfig, PerceptualConfig, TrainVaeConfig
    from .vae_losses import AdversarialTrainer, PerceptualLoss

__all__ = [
    "AdversarialConfig",
    "AdversarialTrainer",
    "AutoencoderLosses",
    "Checkpointer",
    "CropConfig",
    "DamagedCheckpoint",
    "LdmTrainingStep",
    "Learner",
    "Loop",
    "LoopConfig",
    "LoraConfig",
    "MovingAverage",
    "OptimizerConfig",
    "PerceptualConfig",
    "PerceptualLoss",
    "ResumableBatchSampler",
    "TrainLdmConfig",
    "TrainState",
    "TrainVaeConfig",
    "Training",
    "TrainingStep",
    "VaeTrainingStep",
    "build_model",
    "config_changes",
    "derive_seed",
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
    "report_peer_failure",
    "resolve_precision",
    "run_together",
    "run_training",
    "save_config",
    "save_model",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
