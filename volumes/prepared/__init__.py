"""Prepared volumes on disk: what training reads, made once from the files of each case."""
