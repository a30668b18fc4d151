"""Readers and writers of volume files: NIfTI, DICOM, NRRD, MetaImage, and images in memory."""
