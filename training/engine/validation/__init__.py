"""What a run measures of itself: validation, comparisons of generated volumes, previews, and what is best by them."""
