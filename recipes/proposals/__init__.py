"""Propose what training needs: intensities, models, patches, steps; and make them fit the machine."""
