"""Commands that measure whether volumes are what was asked for: their map, classes, numbers and tissue volumes."""
