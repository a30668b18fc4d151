"""Inputs of a pipeline: masks, images, conditions, regions, requests."""
