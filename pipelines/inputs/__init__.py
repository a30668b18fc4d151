"""What people give a pipeline: masks, images, conditions, regions, requests."""
