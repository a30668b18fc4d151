"""Calls of one pipeline side by side equal the same calls one by one, records included: a call's state is its own."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tiny import mask_image, seeded, tiny_pipeline

from pipelines import MedVolumePipeline, read_sidecar
from pipelines.call import one_at_a_time

SHAPES = [(8, 8, 8), (7, 9, 6), (12, 8, 5)]
MASKS = [mask_image(shape, seed=i) for i, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(condition_dropout={"mask": 0.1})


def calls(pipe):
    """Twenty, no two alike, some with several volumes, a callback, an interruption, or another pipeline's scheduler."""
    other = MedVolumePipeline(
        pipe.vae, pipe.unet, UniPCMultistepScheduler.from_config(pipe.scheduler.config), pipe.data
    )
    other.set_progress_bar_config(disable=True)

    def cut(one, step, timestep, tensors):
        if step == 1:
            one._guidance_scale = 1.0
        assert one.num_timesteps == 6

    def stop(one, step, timestep, tensors):
        one._interrupt = step == 2

    def inner(one, step, timestep, tensors):  # a call within a call
        if step == 0:
            one(MASKS[1], num_inference_steps=2, generator=seeded(1), output_type="latent", guidance_scale=2.0)

    extra = [
        {"callback_on_step_end": cut, "num_inference_steps": 6, "guidance_scale": 3.0},
        {"callback_on_step_end": stop, "num_inference_steps": 5},
        {"callback_on_step_end": inner},
        {"mask": MASKS, "generator": seeded(1, 2, 3), "batch_size": 2},
    ]
    for i in range(20):
        asked = {"mask": MASKS[i % 3], "num_inference_steps": 2 + i % 5, "guidance_scale": 1.0 + i % 3}
        asked |= {"generator": seeded(i), "output_type": "pt"}
        yield (other if i % 4 == 3 else pipe), asked | (extra[i // 4] if i % 4 == 2 and i // 4 < 4 else {})


def run(call):
    target, asked = call
    out = target(**{key: copy.copy(value) for key, value in asked.items()} | {"generator": fresh(asked["generator"])})
    return out.volumes, out.provenance


def fresh(generators):
    return [torch.Generator().manual_seed(one.initial_seed()) for one in generators]


def test_twenty_calls_at_once_equal_the_same_calls_one_by_one(pipe):
    every = list(calls(pipe))
    before = copy.deepcopy(pipe.scheduler.__dict__)
    expected = [run(call) for call in every]
    start = threading.Barrier(20)

    def at_once(call):
        start.wait()
        return run(call)

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(at_once, every))
    for (volumes, records), (others, other_records) in zip(results, expected, strict=True):
        assert records == other_records
        assert all(torch.equal(one, other) for one, other in zip(volumes, others, strict=True))
    assert len({str(records) for _, records in expected}) == 20
    assert pipe.scheduler.__dict__.keys() == before.keys() and pipe.scheduler.step_index is None


def test_offloaded_calls_wait_for_each_other():
    """Hooks that move weights, or cast them, would take them away from under another call."""
    for hook in (
        lambda one: one.enable_model_cpu_offload(device="cpu"),
        lambda one: one.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    ):
        pipe = tiny_pipeline()
        hook(pipe)
        shared = MedVolumePipeline(pipe.vae, pipe.unet, pipe.scheduler, pipe.data)
        shared.set_progress_bar_config(disable=True)
        inside, most, lock = [0], [0], threading.Lock()

        def watch(one, step, timestep, tensors, inside=inside, most=most, lock=lock):
            with lock:
                inside[0] += step == 0
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.01)
            with lock:
                inside[0] -= step == one.num_timesteps - 1

        def call(i, pipe=pipe, shared=shared, watch=watch):
            asked = {"generator": seeded(i), "output_type": "pt", "callback_on_step_end": watch}
            return [pipe, shared][i % 2](MASKS[0], num_inference_steps=3, **asked).volumes[0]

        expected = [call(i) for i in range(6)]
        with ThreadPoolExecutor(6) as pool:
            assert all(map(torch.equal, pool.map(call, range(6)), expected))
        assert most[0] == 1


def test_compiled_calls_wait_for_each_other(pipe):
    """Streaming turns compiled code off in all threads: a call beside it would be run as it is written."""
    compiled = torch.compile(torch.nn.Linear(2, 2))
    entered = threading.Event()

    def second():
        with one_at_a_time(compiled):
            entered.set()

    with one_at_a_time(compiled), one_at_a_time(compiled):  # one within another may
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set()
    with one_at_a_time(pipe.unet):
        free = threading.Thread(target=lambda: one_at_a_time(pipe.unet).__enter__())
        free.start()
        free.join(10)
        assert not free.is_alive()


def test_two_calls_write_one_volume_whole(pipe, tmp_path):
    """Whichever is last: the voxels are those of the sidecar beside them."""
    path = tmp_path / "new" / "case.nii"
    expected = {
        seed: pipe(MASKS[0], num_inference_steps=1, generator=seeded(seed), output_type="np").volumes[0]
        for seed in range(8)
    }
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            list(pool.map(lambda s: pipe(MASKS[0], num_inference_steps=1, generator=seeded(s), paths=path), range(8)))
            seed = read_sidecar(path)["seed"]
            np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected[seed][0])
    assert sorted(one.name for one in path.parent.iterdir()) == ["case.json", "case.nii"]


def test_a_model_is_hashed_once_by_many_calls(monkeypatch):
    from pipelines.storage import serialization as stored

    counted, original = [], stored.content_hash
    monkeypatch.setattr(stored, "content_hash", lambda contents: (counted.append(1), original(contents))[1])
    pipe = tiny_pipeline(seed=77)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: pipe.model_hash, range(8)))) == 1
    assert len(counted) == 1


def test_the_scheduler_of_the_pipeline_is_never_stepped():
    pipe = tiny_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    state = copy.deepcopy(pipe.scheduler.__dict__)
    pipe(MASKS[0], num_inference_steps=3)
    for name, value in pipe.scheduler.__dict__.items():
        assert torch.equal(value, state[name]) if isinstance(value, torch.Tensor) else value == state[name], name
