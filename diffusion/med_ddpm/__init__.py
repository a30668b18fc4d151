"""Med-DDPM's network, as a model of ours; `interop` converts its weights."""
