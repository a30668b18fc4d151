"""The latent U-Net: any size, conditions that count, checkpointing that recomputes, files."""

import pytest
import torch

from autoencoder.layers import Conv3d
from diffusion import LatentUNet3D, fold_mask
from diffusion.unet import TimeResidualBlock
from volumes import PADDING

SMALL = {"channels": (8, 16), "strides": (2,), "blocks": (1, 1), "attention": (False, True), "head_dim": 8}


def small_unet(**arguments) -> LatentUNet3D:
    """A small U-Net whose zero-initialized layers are not zero, as after training."""
    torch.manual_seed(0)
    unet = LatentUNet3D(**{**SMALL, **arguments})
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet.eval()


def folded(shape=(1, 12, 12, 12), labels=3, value=None) -> torch.Tensor:
    values = (
        torch.randint(0, labels, shape, generator=torch.Generator().manual_seed(1))
        if value is None
        else torch.full(shape, value)
    )
    return fold_mask(values, (4, 4, 4), labels)


@pytest.mark.parametrize("size", [(3, 3, 3), (8, 8, 8), (9, 13, 7), (10, 11, 6)])
def test_any_size_comes_back(size):
    unet = small_unet(channels=(8, 16, 16), strides=(2, 2), blocks=(1, 1, 1), attention=(False, True, True))
    with torch.no_grad():
        out = unet(torch.randn(2, 4, *size), torch.tensor([10.0, 900.0])).sample
    assert out.shape == (2, 4, *size) and out.isfinite().all()


def test_a_batch_changes_nothing():
    unet, x, mask = small_unet(num_labels=3), torch.randn(2, 4, 5, 6, 7), folded((2, 20, 24, 28))
    with torch.no_grad():
        together = unet(x, torch.tensor([100.0, 700.0]), mask).sample
        alone = torch.cat(
            [unet(x[i : i + 1], torch.tensor([t]), mask[i : i + 1]).sample for i, t in enumerate((100.0, 700.0))]
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_time_and_mask_matter():
    unet, x = small_unet(num_labels=3), torch.randn(1, 4, 3, 3, 3)
    with torch.no_grad():
        base = unet(x, 500, folded(value=1)).sample
        for other in (
            unet(x, 100, folded(value=1)),
            unet(x, 500, folded(value=2)),
            unet(x, 500, folded(value=PADDING)),
        ):
            assert (other.sample - base).abs().mean() > 1e-3


def test_missing_unwanted_and_misplaced_masks_are_refused():
    x = torch.randn(1, 4, 3, 3, 3)
    with pytest.raises(ValueError, match="conditioned on a mask"):
        small_unet(num_labels=3)(x, 1)
    with pytest.raises(ValueError, match="without a mask condition"):
        small_unet()(x, 1, folded())
    with pytest.raises(ValueError, match="folded to"):
        small_unet(num_labels=3)(x, 1, folded((1, 16, 12, 12)))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="one entry per level"):
        LatentUNet3D(channels=(8, 16), strides=(2,), blocks=(1,), attention=(False, True))
    with pytest.raises(ValueError, match="unknown objective 'x0'.*rectified_flow"):
        LatentUNet3D(**SMALL, objective="x0")
    with pytest.raises(ValueError, match="heads of 7"):
        LatentUNet3D(**{**SMALL, "head_dim": 7})


def test_checkpointing_recomputes_and_changes_no_gradient():
    calls = []
    unet, x = small_unet().train(), torch.randn(1, 4, 4, 4, 4)
    for module in unet.modules():
        if isinstance(module, TimeResidualBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[int, list[torch.Tensor]]:
        calls.clear()
        unet.zero_grad()
        unet(x, 300).sample.square().sum().backward()
        return len(calls), [p.grad.clone() for p in unet.parameters()]

    plain_calls, plain = gradients()
    unet.enable_gradient_checkpointing()
    calls_again, again = gradients()
    assert calls_again == 2 * plain_calls  # every block ran once more in the backward pass
    torch.testing.assert_close(again, plain)


def test_saved_and_loaded_is_the_same(tmp_path):
    unet, x, mask = small_unet(num_labels=3, objective="v_prediction"), torch.randn(1, 4, 3, 3, 3), folded()
    unet.save_pretrained(tmp_path)
    loaded = LatentUNet3D.from_pretrained(tmp_path, use_safetensors=True)
    assert loaded.config.objective == "v_prediction"
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), unet.state_dict().values(), strict=True))
    with torch.no_grad():  # loading drops the memory format, so the kernels may differ
        torch.testing.assert_close(loaded(x, 5, mask).sample, unet(x, 5, mask).sample, atol=1e-5, rtol=1e-4)


def test_a_mask_can_be_embedded_once():
    unet, x, mask = small_unet(num_labels=3), torch.randn(1, 4, 3, 3, 3), folded()
    with torch.no_grad():
        torch.testing.assert_close(unet(x, 5, unet.embed_mask(mask)).sample, unet(x, 5, mask).sample)


def test_one_small_volume_is_convolved_like_any():
    """The direct call of oneDNN for a batch of one gives what nn.Conv3d gives."""
    torch.manual_seed(0)
    conv, x = Conv3d(8, 6, 3, padding=1), torch.randn(1, 8, 5, 6, 7)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), torch.nn.Conv3d.forward(conv, x), atol=1e-5, rtol=1e-5)
