"""Small networks that judge volumes: a segmenter, a classifier."""
