"""Masks that are known in part: how they are folded, hidden in training, and refused by models of whole masks."""

import pytest
import torch

from diffusion import LatentUNet3D, fold_mask, unfold_mask
from diffusion.folding import hide_parts
from volumes import PADDING, UNKNOWN

STRIDE, LABELS = (4, 2, 2), 3


def random_labels(batch: int = 1, low: int = 0) -> torch.Tensor:
    labels = torch.randint(low, LABELS, (batch, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    labels[:, :4] = PADDING
    return labels


def unet(**changes) -> LatentUNet3D:
    torch.manual_seed(0)
    return LatentUNet3D(
        channels=(8,), strides=(), blocks=(1,), attention=(False,), num_labels=LABELS, mask_stride=STRIDE, **changes
    )


def test_unknown_voxels_are_folded_like_a_label_after_the_last():
    labels = random_labels(low=0)
    labels[0, 6:9, 2:5, 3] = UNKNOWN
    ids = fold_mask(labels, STRIDE, LABELS, partial=True)
    assert torch.equal(unfold_mask(ids, STRIDE, LABELS), labels.int())
    assert int(ids.max()) > LABELS * 16 and int(ids.max()) <= (LABELS + 1) * 16
    known = labels.where(labels != UNKNOWN, 0)
    same = fold_mask(known, STRIDE, LABELS, partial=True)
    assert torch.equal(same, fold_mask(known, STRIDE, LABELS))  # whole masks are folded as ever
    ids[0, 2, 2, 2, 3] = 0
    assert int(unfold_mask(ids, STRIDE, LABELS)[0, 8, 5, 5]) == PADDING


def test_a_model_of_whole_masks_says_what_to_do():
    labels = random_labels()
    labels[0, 6] = UNKNOWN
    with pytest.raises(ValueError, match=r"label is unknown \(-2\).*model\.partial_masks: 0\.3"):
        fold_mask(labels, STRIDE, LABELS)
    labels[0, 7] = -3
    with pytest.raises(ValueError, match=r"label indices \[-3\]"):
        fold_mask(labels, STRIDE, LABELS, partial=True)
    with pytest.raises(ValueError, match="partial_masks 0.2: this model has no mask condition"):
        LatentUNet3D(partial_masks=0.2)


def test_a_rate_of_0_hides_nothing():
    ids = fold_mask(random_labels(4), STRIDE, LABELS)
    assert torch.equal(hide_parts(ids, STRIDE, LABELS, 0.0, torch.Generator().manual_seed(0)), ids)


def test_boxes_and_labels_are_hidden_and_padding_stays():
    """Of many masks about as many as the rate says are hidden in part: a box, all but a box, or some labels."""
    labels = random_labels()
    whole, kinds, hidden = fold_mask(labels, STRIDE, LABELS), set(), 0
    for seed in range(200):
        ids = hide_parts(whole, STRIDE, LABELS, 0.5, [torch.Generator().manual_seed(seed)])
        found = unfold_mask(ids, STRIDE, LABELS)[0]
        unknown = found == UNKNOWN
        assert torch.equal(found[~unknown], labels[0].int()[~unknown])  # what is known is as it was
        assert not unknown[:4].any()
        if not unknown.any():
            continue
        hidden += 1
        if all(len(set(unknown[labels[0] == label].tolist())) == 1 for label in range(LABELS)):
            kinds.add("labels")
            continue
        inside = unknown if unknown[4:].float().mean() < 0.5 else ~unknown
        inside = inside & (labels[0] != PADDING)
        corners = inside.nonzero()
        low, high = corners.min(0).values, corners.max(0).values + 1
        if int(inside.sum()) == int((high - low).prod()):
            kinds.add("box" if torch.equal(inside, unknown) else "all but a box")
    assert 60 <= hidden <= 120
    assert kinds == {"box", "all but a box", "labels"}


def test_each_volume_is_hidden_by_its_own_generator():
    ids = fold_mask(random_labels(2), STRIDE, LABELS)
    together = hide_parts(ids, STRIDE, LABELS, 0.9, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = hide_parts(ids[1:], STRIDE, LABELS, 0.9, [torch.Generator().manual_seed(2)])
    assert torch.equal(together[1:], alone) and not torch.equal(alone, ids[1:])


def test_a_model_without_the_setting_is_as_it_was():
    plain, partial = unet(), unet(partial_masks=0.2)
    assert not plain.takes_partial_masks and partial.takes_partial_masks
    assert len(partial.mask_embedding.table.weight) == len(plain.mask_embedding.table.weight) + 16
    assert plain.config["partial_masks"] is None
