"""The page that a reader opens, and the report of the analysis: templates, style and scripts."""
