"""Safe reading and writing for every other package: atomic files and folders, locks, untrusted paths."""
