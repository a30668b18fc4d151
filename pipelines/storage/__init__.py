"""Folders and files of pipelines and of what they generate: loading, saving, records."""
