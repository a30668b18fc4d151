"""Folding a mask to the latent grid loses nothing, and its embedding is the 1x1x1 convolution of the folded one-hot."""

import pytest
import torch
import torch.nn.functional as F

from autoencoder.layers import space_to_depth
from diffusion import fold_mask, unfold_mask
from diffusion.folding import FoldedMaskEmbedding, cells_inside
from volumes import PADDING

STRIDE, LABELS = (4, 2, 2), 5


def random_labels(batch=2) -> torch.Tensor:
    labels = torch.randint(0, LABELS, (batch, 8, 6, 4), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = PADDING
    return labels


def test_unfolding_inverts_folding():
    for dtype in (torch.int64, torch.int32, torch.int16):
        labels = random_labels().to(dtype)
        ids = fold_mask(labels, STRIDE, LABELS)
        assert ids.dtype == torch.int32 and torch.equal(labels, random_labels().to(dtype))  # not in its own place
        assert torch.equal(unfold_mask(ids, STRIDE), labels.int())
    flat = random_labels().int()
    fold_mask(flat, (1, 1, 1), LABELS)  # where folding is a view
    assert torch.equal(flat, random_labels().int())


def test_embedding_is_the_convolution_of_the_folded_one_hot():
    labels = random_labels()
    embedding = FoldedMaskEmbedding(LABELS, places=16, width=7)
    one_hot = torch.zeros(2, LABELS, 8, 6, 4)
    for label in range(LABELS):
        one_hot[:, label] = labels == label  # padding is all zeros
    weight = embedding.table.weight[1:].T[:, :, None, None, None]  # (width, labels * places, 1, 1, 1)
    expected = F.conv3d(space_to_depth(one_hot, STRIDE), weight)
    torch.testing.assert_close(embedding(fold_mask(labels, STRIDE, LABELS)), expected)


def test_padding_is_not_background():
    """A cell of padding embeds to exactly zero and never trains; a cell of background does neither."""
    embedding = FoldedMaskEmbedding(LABELS, places=16, width=7)
    padding, background = (fold_mask(torch.full((1, 4, 2, 2), v), STRIDE, LABELS) for v in (PADDING, 0))
    assert not embedding(padding).any()
    assert embedding(background).abs().min() > 0
    embedding(padding).sum().backward()
    assert not embedding.table.weight.grad.any()
    assert not cells_inside(padding).any() and cells_inside(background).all()


def test_labels_that_the_model_does_not_know_are_named():
    labels = random_labels()
    labels[1, 0, 0, 0] = 9
    with pytest.raises(ValueError, match=r"\[9\].*0 to 4"):
        fold_mask(labels, STRIDE, LABELS)
    with pytest.raises(ValueError, match="multiple of the stride"):
        fold_mask(torch.zeros(1, 7, 6, 4, dtype=torch.long), STRIDE, LABELS)


def test_few_and_many_labels_are_embedded_alike(monkeypatch):
    """One product for few labels, a bag of embeddings for many: the same values, the same gradients, none for
    padding."""
    embedding = FoldedMaskEmbedding(3, 8, 4)
    labels = torch.randint(PADDING, 3, (2, 4, 6, 4), generator=torch.Generator().manual_seed(0))
    ids, weights, found = fold_mask(labels, (2, 2, 2), 3), torch.randn(2, 4, 2, 3, 2), []
    for limit in (1 << 24, 0):
        monkeypatch.setattr("diffusion.folding.DENSE_ELEMENTS", limit)
        embedding.zero_grad()
        embedded = embedding(ids)
        (embedded * weights).sum().backward()
        found.append((embedded.detach(), embedding.table.weight.grad.clone()))
    (dense, dense_gradient), (bag, bag_gradient) = found
    assert torch.allclose(dense, bag, atol=1e-6) and torch.allclose(dense_gradient, bag_gradient, atol=1e-5)
    assert not dense_gradient[0].any() and dense_gradient[1:].any()
