"""Published systems, trained by their own code on our data for the same minutes as ours."""
