"""Weights that others trained: read without running their code, check key by key, and write as folders of ours."""
