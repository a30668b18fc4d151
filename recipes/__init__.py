"""Look a folder of scans over and write a recipe: data.yaml, vae.yaml and ldm.yaml (`python -m recipes DIR`)."""
