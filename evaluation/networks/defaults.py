"""Choices and defaults that `--help` shows before torch is imported. The modules that use them import them from
here."""

# utility.py: training sets of a segmenter, and the voxels that volumes are cropped or padded to
REAL, SYNTHETIC, BOTH = SOURCES = ("real", "synthetic", "both")
SHAPE = (40, 56, 40)
# few_labels.py
# As many steps as `both`: what remains of both/real over it is owed to the volumes, not to the steps.
REAL_LONGER = "real_longer"
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
SHIFT = 2  # voxels: a copy may be moved by up to that along each axis
# samplers.py: schedulers by the names of sampler_figures.py
SCHEDULERS = ("euler", "heun", "dpmsolver++", "unipc", "ddim", "ddpm")

SEGMENTER_STEPS = 600  # for one source; twice as many for real and synthetic together
PRETRAINING_STEPS = 1200
CLASSIFIER_STEPS = 600
SIMILARITY_PAIRS = 500  # of each set, at most, for MS-SSIM
