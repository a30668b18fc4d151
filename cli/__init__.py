"""The command line: arguments, settings from files, progress, signals."""
