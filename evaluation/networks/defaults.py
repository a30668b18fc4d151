"""Choices and defaults that commands show in `--help` before torch is imported, and that the modules which use them import
from here."""

# utility.py: what a segmenter learns from, and the voxels that volumes are cropped or padded to
REAL, SYNTHETIC, BOTH = SOURCES = ("real", "synthetic", "both")
SHAPE = (40, 56, 40)
# few_labels.py
REAL_LONGER = (
    "real_longer"  # as many steps as `both`: what is left of both/real then is owed to the volumes, not to the steps
)
FEW_LABELS = ("8", "16", "32", "all")  # budgets
ARMS = (REAL, SYNTHETIC, BOTH, REAL_LONGER)
ANY = "any"  # the budget of an arm whose training set is the same at all budgets
# pretraining.py
PRETRAIN_LABELS = ("4", "8", "16", "32", "all")  # budgets
STARTS = ("scratch", "synthetic", "real")
# realism.py
REALISM_PARTS = ("features", "diversity", "consistency", "intensity")
# commands/privacy.py
SPACES = ("image", "latent", "features")
ALPHA = 0.05  # share of unseen volumes that may count as memorized
SHIFT = 2  # voxels by which a copy may be moved along each axis
# samplers.py: schedulers by the names of sampler_figures.py
SCHEDULERS = ("euler", "heun", "dpmsolver++", "unipc", "ddim", "ddpm")

SEGMENTER_STEPS = 600  # of one source; real and synthetic together get twice as many
PRETRAINING_STEPS = 1200
CLASSIFIER_STEPS = 600
SIMILARITY_PAIRS = 500  # most pairs of each set whose MS-SSIM is taken
