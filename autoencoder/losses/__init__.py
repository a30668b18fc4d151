"""Losses of an autoencoder, each averaged inside the field of view: voxels and latents, perceptual, adversarial."""
