"""Latents of a data set on disk: the cache, its entries, and the store at a URL that machines share."""
