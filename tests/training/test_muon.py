"""Muon: updates are near-orthogonal, only hidden kernels get them, and its state survives a checkpoint."""

import copy

import torch
from torch import nn

from training.engine.muon import Muon, is_kernel, orthogonalize


def test_singular_values_come_near_one_and_directions_stay():
    torch.manual_seed(0)
    for shape in ((16, 54), (54, 16)):
        matrix = torch.randn(*shape, dtype=torch.float64) * 1e-3
        result = orthogonalize(matrix)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.25
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        rotated = u.T.float() @ result @ v.T.float()  # diagonal if the singular vectors are the matrix's own
        assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 1e-3


def test_a_zero_gradient_moves_nothing():
    assert not orthogonalize(torch.zeros(12, 30)).any()


def test_matrices_together_equal_each_alone():
    matrices = torch.randn(3, 12, 30)
    torch.testing.assert_close(orthogonalize(matrices), torch.stack([orthogonalize(m) for m in matrices]))


def test_only_hidden_kernels_are_muons():
    model = nn.Sequential(
        nn.Conv3d(8, 32, 3), nn.Conv3d(32, 32, 3), nn.Conv3d(32, 32, 1), nn.Conv3d(32, 8, 3), nn.Linear(32, 32)
    )
    assert [name for name, p in model.named_parameters() if is_kernel(p)] == ["1.weight"]


def descend(model: nn.Module, optimizer: Muon, steps: int) -> float:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 12, 5, 5, 5, generator=generator)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = (model(x) - x.roll(1, 2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def build() -> tuple[nn.Module, Muon]:
    torch.manual_seed(0)
    conv = nn.Conv3d(12, 12, 3, padding=1)
    return conv, Muon(
        [{"params": [conv.weight], "muon": True}, {"params": [conv.bias]}], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0
    )


def test_it_learns_a_shift_faster_than_adamw():
    conv, muon = build()
    twin = copy.deepcopy(conv)
    adam = Muon(
        [{"params": list(twin.parameters())}], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0
    )  # no muon group: AdamW
    assert descend(conv, muon, 40) < 0.7 * descend(twin, adam, 40)


def test_loaded_state_goes_on_exactly():
    conv, muon = build()
    descend(conv, muon, 5)
    other, resumed = build()
    other.load_state_dict(conv.state_dict())
    resumed.load_state_dict(copy.deepcopy(muon.state_dict()))
    descend(conv, muon, 5)
    descend(other, resumed, 5)
    assert torch.equal(conv.weight, other.weight) and torch.equal(conv.bias, other.bias)  # pyright: ignore[reportArgumentType]
