"""`spacing=` of a shape: the grid's own where a model knows any spacing, else one that the volume is resampled to."""

import numpy as np
import pytest
from tiny import seeded, tiny_pipeline


def pipeline(**changes):
    return tiny_pipeline(num_labels=0, labels={}, **changes)


def test_a_model_of_any_spacing_takes_it_as_it_is():
    """Directions and origin are the template's."""
    pipe = pipeline(spacing=None)
    request = {"shape": (8, 12, 8), "num_inference_steps": 1}
    plain = pipe(**request, generator=seeded(0), output_type="np")
    fine = pipe(**request, spacing=(0.5, 0.25, 4.0), generator=seeded(0), output_type="np")
    assert np.array_equal(plain.volumes[0], fine.volumes[0])  # it has no numbers that depend on it
    image = pipe(**request, spacing=(0.5, 0.25, 4.0)).volumes[0]
    expected = np.diag([0.5, 0.25, 4.0, 1.0])
    expected[:3, 3] = pipe.volume_processor.affine[:3, 3]
    assert np.allclose(image.affine, expected) and image.shape == (8, 12, 8)
    assert fine.provenance[0]["spacing"] == [0.5, 0.25, 4.0] and "spacing" not in plain.provenance[0]


def test_a_model_of_one_spacing_resamples():
    pipe = pipeline(spacing=[1.0, 1.0, 1.0])
    request = {"shape": (8, 8, 8), "num_inference_steps": 1, "generator": seeded(0)}
    with pytest.warns(UserWarning, match="the shape asked for: has a spacing of 2 x 1 x 1 mm.*the shape is resampled"):
        image = pipe(**request, spacing=(2.0, 1.0, 1.0)).volumes[0]
    assert image.shape == (8, 8, 8) and np.allclose(np.abs(np.diag(image.affine)), [2, 1, 1, 1])
    latents = pipe(**request, spacing=(1.0, 1.0, 1.0), output_type="latent").volumes[0]
    assert latents.shape[1:] == (2, 2, 2)
    with pytest.warns(UserWarning, match="is resampled"):
        latents = pipe(**request, spacing=(2.0, 1.0, 1.0), output_type="latent").volumes[0]
    assert latents.shape[1:] == (4, 2, 2)  # 16 mm along the first axis


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"spacing": (1, 1, 1)}, "spacing: is of a shape"),
        ({"shape": (8, 8, 8), "spacing": 1.0}, "three lengths of a voxel"),
        ({"shape": (8, 8, 8), "spacing": (1, 1, 0)}, "0.0001 to 100 mm each"),
        ({"shape": (8, 8, 8), "spacing": (1, 1, float("nan"))}, "three lengths"),
    ],
)
def test_spacings_that_are_none(request_, message):
    with pytest.raises(ValueError, match=message):
        pipeline(spacing=None)(**request_)
