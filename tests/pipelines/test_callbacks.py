"""Callbacks as diffusers documents them: what they see, what they change, what they must not return; the progress
bar."""

import contextlib
import io
import threading

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from tiny import mask_image, seeded, tiny_pipeline

from pipelines import read_sidecar

MASK = mask_image((7, 8, 6))


@pytest.fixture
def pipe():
    return tiny_pipeline(condition_dropout={"mask": 0.1})


def generate(pipe, **asked):
    asked = {"mask": MASK, "num_inference_steps": 4, "generator": seeded(0), "output_type": "latent"} | asked
    return pipe(**asked)


def test_interrupt_ends_the_steps_and_is_recorded(pipe, tmp_path):
    seen = []

    def stop(one, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        one._interrupt = step == 1
        one._num_timesteps = 0  # theirs to write, and of no effect on the record

    out = generate(pipe, callback_on_step_end=stop)
    assert len(seen) == 2 and torch.equal(out.volumes[0], seen[1][0])
    assert out.provenance[0]["callback"] == {"interrupted_after": 2}
    assert "callback" not in generate(pipe).provenance[0] and len(generate(pipe).volumes) == 1  # of this call alone
    assert pipe.interrupt is False and pipe.num_timesteps == 4

    masks, paths = [MASK, MASK, MASK], [tmp_path / f"{i}.nii" for i in range(3)]
    asked = {"batch_size": 2, "generator": seeded(0, 1, 2), "callback_on_step_end": stop}
    out = generate(pipe, mask=masks, **asked)
    assert out.volumes[2] is None and out.volumes[0] is not None
    assert [record["callback"]["interrupted_after"] for record in out.provenance] == [2, 2, 0]
    out = generate(pipe, mask=masks, paths=paths, output_type="nifti", **asked | {"generator": seeded(0, 1, 2)})
    assert out.volumes == [*paths[:2], None] and [path.exists() for path in paths] == [True, True, False]
    assert read_sidecar(paths[0])["callback"] == {"interrupted_after": 2}


def test_guidance_that_a_callback_begins_keeps_to_the_interval(pipe):
    """Of levels 1, 0.75, 0.5 and 0.25 two are in (0, 0.5]; the call itself has no guidance."""

    def begin(one, step, timestep, tensors):
        one._guidance_scale = 3.0

    [record] = generate(pipe, guidance_interval=(0, 0.5), callback_on_step_end=begin).provenance
    assert record["network_calls"] == 4 + 2 and record["guidance_interval"] == [0.0, 0.5]
    assert record["callback"] == {"guidance_scale": {"0": 3.0}}


def test_another_thread_interrupts(pipe):
    begun, seen = threading.Event(), []

    def slow(one, step, timestep, tensors):
        seen.append(step)
        begun.set()
        threading.Event().wait(0.2)

    def interrupt():
        begun.wait(10)
        pipe._interrupt = True

    thread = threading.Thread(target=interrupt)
    thread.start()
    out = generate(pipe, num_inference_steps=50, callback_on_step_end=slow)
    thread.join()
    assert len(seen) < 10 and out.provenance[0]["callback"] == {"interrupted_after": len(seen)}


def test_guidance_that_a_callback_sets_acts_from_the_next_step(pipe):
    """3 and then 1 from the third step on: what two runs by hand give, from noise and from the latents in between."""
    seen = {}

    def cut(one, step, timestep, tensors):
        assert one.guidance_scale == (3.0 if step < 2 else 1.0)
        seen[step] = tensors["latents"].clone()
        if step == 1:
            one._guidance_scale = 1.0

    out = generate(pipe, guidance_scale=3.0, callback_on_step_end=cut)
    plain, guided = {}, {}
    generate(pipe, callback_on_step_end=lambda p, i, t, k: plain.update({i: k["latents"].clone()}))
    generate(pipe, guidance_scale=3.0, callback_on_step_end=lambda p, i, t, k: guided.update({i: k["latents"].clone()}))
    assert torch.equal(seen[1], guided[1]) and not torch.equal(seen[2], guided[2])
    rest = generate(pipe, sigmas=[0.5, 0.25], latents=seen[1])
    torch.testing.assert_close(out.volumes[0], rest.volumes[0])
    assert not torch.equal(out.volumes[0], guided[3][0]) and not torch.equal(out.volumes[0], plain[3][0])
    assert out.provenance[0]["callback"] == {"guidance_scale": {"1": 1.0}} and out.provenance[0]["guidance_scale"] == 3
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(pipe, callback_on_step_end=lambda p, *_: setattr(p, "_guidance_scale", {"sex": 2.0}))
    with pytest.raises(ValueError, match="never trained without mask"):
        generate(tiny_pipeline(), callback_on_step_end=lambda p, *_: setattr(p, "_guidance_scale", 2.0))


def test_each_batch_begins_with_the_guidance_of_the_call(pipe):
    def cut(one, step, timestep, tensors):
        one._guidance_scale = 1.0

    asked = {"guidance_scale": 3.0, "callback_on_step_end": cut}
    alone = [generate(pipe, **asked, generator=seeded(seed)).volumes[0] for seed in (0, 1)]
    both = generate(pipe, mask=[MASK, MASK], batch_size=1, **asked, generator=seeded(0, 1)).volumes
    assert all(map(torch.equal, alone, both))


class Half(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * self.config["cutoff_step_ratio"]):
            callback_kwargs["latents"] = torch.full_like(callback_kwargs["latents"], 0.5)
        return callback_kwargs


def test_diffusers_callback_classes(pipe):
    expected = generate(
        pipe, callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] * 0 + 0.5} if i == 2 else {}
    )
    for callback in (Half(0.5), MultiPipelineCallbacks([Half(0.5), Half(0.5)])):
        out = generate(pipe, callback_on_step_end=callback)
        assert torch.equal(out.volumes[0], expected.volumes[0])
        assert out.provenance[0]["callback"] == {"latents": [2]}
    with pytest.raises(ValueError, match="names prompt_embeds; this pipeline's steps have latents"):
        generate(pipe, callback_on_step_end=SDCFGCutoffCallback())


def test_latents_changed_in_place_are_recorded(pipe):
    def scale(one, step, timestep, tensors):
        if step == 3:
            tensors["latents"] *= 2

    out = generate(pipe, callback_on_step_end=scale)
    torch.testing.assert_close(out.volumes[0], 2 * generate(pipe).volumes[0])
    assert out.provenance[0]["callback"] == {"latents": [3]}


def test_the_tensors_that_a_callback_is_given(pipe):
    given = []
    for inputs in (["latents"], (), ["latents", "latents"]):
        generate(
            pipe,
            num_inference_steps=1,
            callback_on_step_end=lambda p, i, t, k: given.append(list(k)),
            callback_on_step_end_tensor_inputs=inputs,
        )
    assert given == [["latents"], [], ["latents"]]
    for inputs, words in (
        (["image"], "names image"),
        ("latents", "is a list"),
        (None, "is a list"),
        ([1], "list of names"),
    ):
        with pytest.raises(ValueError, match=f"callback_on_step_end_tensor_inputs.*{words}"):
            generate(pipe, callback_on_step_end_tensor_inputs=inputs)
    with pytest.raises(ValueError, match="callback_on_step_end is called as"):
        generate(pipe, callback_on_step_end=3)


RETURNS = {
    "callback_on_step_end returned Tensor; return the dict": lambda k: k["latents"],
    r"callback_on_step_end returned \['noise'\]; it may return \['latents'\]": lambda k: {"noise": k["latents"]},
    "callback_on_step_end returned list for latents": lambda k: {"latents": k["latents"].tolist()},
    "callback_on_step_end returned NoneType for latents": lambda k: {"latents": None},
    "torch.float64, on cpu; return latents .*torch.float32": lambda k: {"latents": k["latents"].double()},
    r"returned latents \(1, 2, 2, 2, 2\)": lambda k: {"latents": k["latents"][:, :2]},
    "on meta; return latents .* on cpu": lambda k: {"latents": k["latents"].to("meta")},
    "latents that are not finite": lambda k: {"latents": k["latents"] * torch.inf},
    "latents that are not": lambda k: k["latents"].fill_(torch.nan) and None,
}


@pytest.mark.parametrize("message", RETURNS)
def test_what_a_callback_must_not_return(pipe, message):
    def returns(one, step, timestep, tensors):
        if message == "latents that are not":
            tensors["latents"].fill_(torch.nan)
            return None
        return RETURNS[message](tensors)

    with pytest.raises(ValueError, match=message):
        generate(pipe, callback_on_step_end=returns)


def test_callbacks_are_not_blamed_for_non_finite_weights(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="the volume of seed 0 is not finite"):
        generate(pipe, callback_on_step_end=lambda *_: None)


# The progress bar


def shown(**options):
    pipe, file = tiny_pipeline(), io.StringIO()
    pipe.set_progress_bar_config(**options)
    with contextlib.redirect_stderr(file):
        generate(pipe)
    return file.getvalue()


def test_every_option_of_the_progress_bar_acts():
    assert "denoise" in shown() and "4/4" in shown(leave=True)
    assert "MINE" in shown(desc="MINE") and "denoise" not in shown(desc="MINE")
    assert shown(leave=True).endswith("\n") and not shown(leave=False).endswith("\n")
    assert "it/s" not in shown(bar_format="{n}/{total}") and "volumes" in shown(unit="volumes", leave=True)
    assert shown(disable=True) == shown(disable=None) == "" != shown(disable=False)
    elsewhere = io.StringIO()
    assert shown(file=elsewhere) == "" and "denoise" in elsewhere.getvalue()
    pipe = tiny_pipeline()
    bar = pipe.progress_bar(total=3)
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2] and bar.disable  # as tiny_pipeline asks


@pytest.mark.parametrize(
    "options", [{"total": 3}, {"colr": "red"}, {"iterable": []}, {"bar_format": "{nothing}"}, {"disable": "no"}]
)
def test_options_that_tqdm_does_not_take_are_refused_at_once(options):
    with pytest.raises(ValueError, match=f"set_progress_bar_config.*{next(iter(options))}"):
        tiny_pipeline().set_progress_bar_config(**options)
    thread = threading.Thread(target=lambda: shown(leave=True), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()  # tqdm holds its lock for ever where showing a bar fails
