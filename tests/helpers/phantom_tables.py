"""Phantoms with a table of conditions."""

from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases

PHANTOM = {"classes": {"class": ["bright lesion", "dark lesion"]}, "numbers": ["lesion_volume"]}


def phantoms(**changes) -> VolumeDataset:
    config = DataConfig(phantom=PhantomConfig(count=5, shape=(12, 12, 12)), **changes)
    return VolumeDataset(load_cases(config), config)
