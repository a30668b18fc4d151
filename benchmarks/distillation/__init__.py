"""Which loss makes the best student of a diffusion model in a given time."""
