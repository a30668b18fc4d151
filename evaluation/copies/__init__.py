"""Fingerprints of training volumes, and volumes that show no patient."""
