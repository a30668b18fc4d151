"""Weights of labels in a loss, as people write them: {lesion: 100}."""

from collections.abc import Mapping


def weights_by_index(weights: Mapping[int | str, float], labels: Mapping[int, str]) -> dict[int, float]:
    """Translate {label value or name: weight} to {label index: weight}.

    Args:
        labels: label values and names of the training masks; empty without masks.
    Raises: ValueError for a label that the masks do not have, and for one that is named twice.
    """
    if weights and not labels:
        raise ValueError(f"loss_weights {dict(weights)}: the data has no masks that say where a label is; remove it")
    values = {name: value for value, name in labels.items()} | {value: value for value in labels}
    if unknown := [label for label in weights if label not in values]:
        listing = ", ".join(f"{value} ({name})" for value, name in sorted(labels.items()))
        raise ValueError(f"loss_weights names {unknown}; the labels of the masks are {listing}")
    order = sorted(labels)
    found = {order.index(values[label]): float(weight) for label, weight in weights.items()}
    if len(found) < len(weights):
        raise ValueError(f"loss_weights {dict(weights)} names a label twice, by value and by name; remove one")
    return found
