"""Labels in a training's config: their weights in a loss, as people write them ({lesion: 100}), and unknown ones."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from volumes import UNKNOWN

if TYPE_CHECKING:
    from diffusion import LatentDenoiser
    from volumes import VolumeDataset

    from .ldm_config import TrainLdmConfig


def weights_by_index(weights: Mapping[int | str, float], labels: Mapping[int, str]) -> dict[int, float]:
    """Translate {label value or name: weight} to {label index: weight}.

    Args:
        labels: label values and names of the training masks; empty without masks.
    Raises: ValueError for a label that the masks do not have, for one that is named twice, and for a name of several.
    """
    if weights and not labels:
        raise ValueError(f"loss_weights {dict(weights)}: the data has no masks that say where a label is; remove it")
    values = {name: value for value, name in labels.items()} | {value: value for value in labels}
    if unknown := [label for label in weights if label not in values]:
        listing = ", ".join(f"{value} ({name})" for value, name in sorted(labels.items()))
        raise ValueError(f"loss_weights names {unknown}; the labels of the masks are {listing}")
    _refuse_shared([label for label in weights if isinstance(label, str)], labels)
    order = sorted(labels)
    found = {order.index(values[label]): float(weight) for label, weight in weights.items()}
    if len(found) < len(weights):
        raise ValueError(f"loss_weights {dict(weights)} names a label twice, by value and by name; remove one")
    return found


def label_weights(
    config: "TrainLdmConfig", labels: Mapping[int, str], unet: "LatentDenoiser"
) -> dict[str, tuple[int, float]]:
    """Return {label name: (label index, weight)} of `config.loss_weights`.

    Raises: ValueError for labels that the masks do not have or whose name others have, and for a model without masks.
    """
    if config.loss_weights and not unet.num_labels:
        raise ValueError(
            f"loss_weights {config.loss_weights}: the model is trained without a mask (model.num_labels: 0), which "
            "says where a label is; remove one of them"
        )
    names = [labels[value] for value in sorted(labels)]
    weights = weights_by_index(config.loss_weights, labels)
    _refuse_shared([names[index] for index in weights], labels)
    if twice := sorted({names[index] for index in weights} & set(config.data.channels)):
        raise ValueError(f"loss_weights: {twice} names a label and a channel; call one of them something else")
    return {names[index]: (index, weight) for index, weight in weights.items()}


def check_best_by(best_by: str | None, weights: Mapping[str, tuple[int, float]], held_out: "VolumeDataset") -> None:
    """Raises: ValueError if the best weights are to be chosen by the loss in a label that no held-out mask has.

    Args:
        best_by: of the loop, such as "loss/lesion".
        weights: `label_weights`.
    """
    label, _ = weights.get((best_by or "").removeprefix("loss/"), (None, 0.0))
    if label is None or any(facts.mask is not None and facts.mask.counts[label] for facts in held_out.facts):
        return
    raise ValueError(
        f"loop.best_by {best_by}: no held-out mask has this label, so there would be nothing to judge by; hold out "
        "subjects that have it (data.validation_fraction, or a split in the table), or judge by loss"
    )


def _refuse_shared(names: Sequence[str], labels: Mapping[int, str]) -> None:
    """Raises: ValueError for a name that several labels have."""
    for name in names:
        if len(values := sorted(value for value, other in labels.items() if other == name)) > 1:
            raise ValueError(
                f"loss_weights: the labels {', '.join(map(str, values))} are all called {name!r}; give each a name of "
                "its own in data.label_names"
            )


def check_partial_masks(config: "TrainLdmConfig") -> None:
    """Raises: ValueError for training masks that are known in part, and a model that takes whole masks only."""
    called = UNKNOWN in config.data.label_names  # then it is a label like others
    hidden = [] if called else sorted(str(one) for one, target in config.data.label_map.items() if target == UNKNOWN)
    takes = config.model.get("partial_masks") is not None or config.model.get("num_labels") == 0
    if hidden and not takes:
        raise ValueError(
            f"data.label_map says that the label is unknown where masks hold {', '.join(hidden)} ({UNKNOWN}); set "
            "model.partial_masks (0.3 hides a part of every third mask besides, 0 hides nothing more)"
        )
