"""Studies: realism, privacy, utility, adherence, reconstruction, samplers."""
