"""Networks of MONAI that hold weights which others trained, and the steps of MAISI's sampler."""
