"""Small networks that score volumes: a segmenter, a classifier."""
