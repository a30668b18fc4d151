"""Reading and writing safely, for every other package: atomic files and folders, locks, paths that others wrote."""
