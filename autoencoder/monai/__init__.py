"""Networks of MONAI that hold weights which others trained."""
