"""Each grid of a call is sampled with its own shift of timesteps, which its record names."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny import tiny_pipeline

from diffusion.objectives import shifted
from pipelines import MedVolumePipeline
from pipelines.inputs.request import VolumeRequest
from pipelines.sampling import SamplingConfig

SHAPES = [(16, 16, 16), (8, 8, 16)]  # 64 and 16 latent voxels
STEPS = 4


@pytest.fixture
def pipe():
    one = tiny_pipeline(num_labels=0, labels={})
    one.unet.register_to_config(shift_voxels=16)
    return one


def generate(pipe, shapes, **how):
    """The volumes, their records, and the timesteps at which the U-Net was asked, by the latents' shape."""
    asked: dict[tuple, list[float]] = {}

    def note(module, args, kwargs):
        asked.setdefault(tuple(args[0].shape[2:]), []).append(float(args[1]))

    hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(shapes))]
    how = {"num_inference_steps": STEPS} | how
    volumes, records = [], []
    for shape, generator in zip(shapes, generators, strict=True):
        out = pipe(shape=shape, generator=generator, output_type="pt", **how)
        volumes += out.volumes
        records += out.provenance
    hook.remove()
    return volumes, records, asked


def test_each_grid_has_its_own_shift(pipe):
    _, records, asked = generate(pipe, SHAPES)
    even = [1000 * (1 - i / STEPS) for i in range(STEPS)]
    assert asked[4, 4, 4] == pytest.approx([shifted(t, 2.0, 1000) for t in even], rel=1e-5)
    assert asked[2, 2, 4] == pytest.approx(even, rel=1e-6)
    assert [record["scheduler"]["shift"] for record in records] == [2.0, 1.0]
    assert pipe.scheduler.shift == 1.0  # the call's schedulers are its own


def test_grids_of_one_call_are_as_alone(pipe):
    sampling = SamplingConfig(STEPS).filled(pipe.sampling_settings)
    prepared = pipe.prepare([VolumeRequest(shape=shape) for shape in SHAPES], sampling)
    assert [volume.record.scheduler["shift"] for volume in prepared] == [2.0, 1.0]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    together = pipe.generate(prepared, sampling, generators, output_type="pt")
    alone, records, _ = generate(pipe, SHAPES)
    for ours, volume, record in zip(together, alone, records, strict=True):
        assert torch.equal(ours.output, volume) and ours.record.to_json() == record


def test_a_grid_of_the_base_size_is_as_without_a_shift(pipe):
    plain = tiny_pipeline(num_labels=0, labels={})
    assert torch.equal(generate(pipe, SHAPES[1:])[0][0], generate(plain, SHAPES[1:])[0][0])
    assert not torch.equal(generate(pipe, SHAPES[:1])[0][0], generate(plain, SHAPES[:1])[0][0])
    assert plain.model_hash != pipe.model_hash


def test_sigmas_of_a_call_are_not_shifted(pipe):
    _, [record], asked = generate(pipe, SHAPES[:1], num_inference_steps=None, sigmas=[1.0, 0.5, 0.25])
    assert asked[4, 4, 4] == [1000.0, 500.0, 250.0] and record["scheduler"]["shift"] == 1.0


def test_a_scheduler_with_its_own_shift_wins(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.warns(UserWarning, match="shift=3.0 is taken for grids of all sizes"):
        _, [record], asked = generate(pipe, SHAPES[:1])
    assert record["scheduler"]["shift"] == 3.0
    assert asked[4, 4, 4][1] == pytest.approx(shifted(750.0, 3.0, 1000), rel=1e-5)


def test_a_saved_pipeline_shifts_as_before(pipe, tmp_path):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    before, [record], _ = generate(pipe, SHAPES[:1])
    pipe.save_pretrained(tmp_path)
    loaded = MedVolumePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again, [other], _ = generate(loaded, SHAPES[:1])
    assert torch.equal(before[0], again[0]) and record == other and record["scheduler"]["flow_shift"] == 2.0
