"""Data sets: tables and patterns of files, cases, splits by subject, preprocessing."""
