"""Sets of real and generated volumes to compare."""
