"""Generated volumes as data sets in the layouts of other tools."""
