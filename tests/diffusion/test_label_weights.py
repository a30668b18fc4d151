"""Weights of labels in the diffusion loss: a lesion of two voxels counts in full, and the loss keeps its scale."""

import torch

from diffusion import Conditions, fold_mask, training_loss
from diffusion.folding import cells_with, emphasis_of
from volumes import PADDING, UNKNOWN

STRIDE = (4, 4, 4)
LABELS = 3


def lesion_mask() -> torch.Tensor:
    """Two latent voxels of background, one with two voxels of label 2, one of padding; along x."""
    labels = torch.zeros(1, 16, 4, 4, dtype=torch.int64)
    labels[0, 5, 1, 1:3] = 2
    labels[0, 12:] = PADDING
    return fold_mask(labels, STRIDE, LABELS)


class Constant(torch.nn.Module):
    """Predicts zero, and remembers its latents."""

    def forward(self, sample, timestep, return_dict=True, **conditions):
        self.seen = sample
        return (torch.zeros_like(sample),)


def test_the_largest_weight_of_a_latent_voxel_counts():
    ids = lesion_mask()
    assert emphasis_of(ids, {2: 100.0}, LABELS).flatten().tolist() == [1, 100, 1, 0]
    assert emphasis_of(ids, {0: 0.5, 2: 100.0}, LABELS).flatten().tolist() == [0.5, 100, 0.5, 0]
    assert emphasis_of(ids, {}, LABELS).flatten().tolist() == [1, 1, 1, 0]
    assert cells_with(ids, 2).flatten().tolist() == [False, True, False, False]
    assert cells_with(ids, 0).flatten().tolist() == [True, True, True, False]
    hidden = fold_mask(torch.full((1, 4, 4, 4), UNKNOWN), STRIDE, LABELS, partial=True)
    assert emphasis_of(hidden, {2: 100.0}, LABELS).flatten().tolist() == [1]
    assert not any(cells_with(hidden, label).any() for label in range(LABELS))


def loss_of(emphasis: torch.Tensor | None) -> tuple[float, torch.Tensor]:
    latents = torch.arange(1.0, 9.0).view(2, 1, 4, 1, 1)
    weight = torch.ones(2, 1, 4, 1, 1)
    weight[:, :, 3] = 0
    unet, generators = Constant(), [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    how = {} if emphasis is None else {"emphasis": emphasis}
    loss = training_loss(unet, "epsilon", latents, Conditions(), weight, generators, **how)
    return loss.item(), unet.seen


def test_weights_below_1_keep_the_scale_of_the_loss():
    """Where all weights are equal, however small, the loss is the plain one; where all are zero it is 0."""
    plain, _ = loss_of(None)
    assert abs(loss_of(torch.full((2, 1, 4, 1, 1), 0.01))[0] / plain - 1) < 1e-5
    assert loss_of(torch.zeros(2, 1, 4, 1, 1))[0] == 0


def test_the_loss_is_the_weighted_mean_of_each_volume():
    """Of noise that is predicted as zero: by hand, without the padding; the network sees the same latents."""
    emphasis = torch.tensor([1.0, 100.0, 1.0, 7.0]).view(1, 1, 4, 1, 1).repeat(2, 1, 1, 1, 1)
    emphasis[1, :, 1] = 3.0
    plain, seen = loss_of(None)
    weighted, seen_again = loss_of(emphasis)
    assert torch.equal(seen, seen_again)
    errors = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        torch.randint(0, 1000, (1,), generator=generator)  # the timestep
        errors.append(torch.randn(4, generator=generator)[:3].square())
    by_hand = torch.stack(errors)
    torch.testing.assert_close(torch.tensor(plain), by_hand.mean())
    weights = emphasis[:, 0, :3, 0, 0]
    torch.testing.assert_close(torch.tensor(weighted), ((by_hand * weights).sum(1) / weights.sum(1)).mean())


def test_equal_weights_change_nothing():
    assert loss_of(torch.ones(2, 1, 4, 1, 1))[0] == loss_of(None)[0]
    assert abs(loss_of(torch.full((2, 1, 4, 1, 1), 50.0))[0] - loss_of(None)[0]) < 1e-5
