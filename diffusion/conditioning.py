"""Conditions of a U-Net: the schema of a model, and the tensors of one batch.

Axes: latents (B, C, h, w, d). A condition that is dropped has the value in `ABSENT`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from .images import image_columns

ABSENT = {"mask": 0, "image": 0, "classes": -1, "numbers": float("nan")}


@dataclass(frozen=True)
class ConditionSchema:
    """The conditions that a model knows, by the names that people use.

    Attributes:
        mask: whether a mask conditions it.
        classes, numbers: names, one per column of the tensors, in alphabetical order.
        values: the values of each class, in the order of their indices.
        images: name and number of latent channels of each condition channel, in alphabetical order.
        images_are_all: whether the images are all channels of the model, so at least one must be absent.
        dropout: how often training drops each condition.
    """

    mask: bool = False
    classes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    images: tuple[tuple[str, int], ...] = ()
    images_are_all: bool = False
    dropout: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the schema from a U-Net's config.

        Raises: ValueError for a name used twice, for dropout of unknown conditions or rates outside [0, 1), for images
        whose channels do not fit into the latents, and for a model whose condition channels would always be all of its
        channels.
        """
        classes, numbers, images = (config[key] or {} for key in ("classes", "numbers", "images"))
        schema = cls(
            mask=bool(config["num_labels"]),
            classes=tuple(sorted(classes)),
            numbers=tuple(sorted(numbers)),
            images=tuple(sorted(images.items())),
            images_are_all=bool(images) and sum(images.values()) == config["in_channels"],
            dropout=dict(config["condition_dropout"] or {}),
            values={name: list(classes[name]) for name in sorted(classes)},
        )
        schema.check_dropout()
        schema._check_images(config["in_channels"])
        return schema

    def check_dropout(self) -> None:
        """Raise ValueError for dropout of unknown conditions, and rates outside [0, 1)."""
        if unknown := sorted(set(self.dropout) - set(self.names)):
            raise ValueError(f"condition_dropout names {unknown}; the model's conditions are {sorted(self.names)}")
        if wrong := {name: rate for name, rate in self.dropout.items() if not 0 <= rate < 1}:
            raise ValueError(f"condition_dropout is a probability of at least 0 and below 1, got {wrong}")

    def _check_images(self, latent_channels: int) -> None:
        images = dict(self.images)
        if twice := sorted(set(images) & {*self.classes, *self.numbers, "mask"}):
            raise ValueError(
                f"{twice} name two conditions; call the image's channel, the class or the number something else"
            )
        if min(images.values(), default=1) < 1 or sum(images.values()) > latent_channels:
            raise ValueError(f"images {images} are latent channels of each image, {latent_channels} or fewer together")
        always = sorted(name for name in images if not self.dropout.get(name))
        if self.images_are_all and always:
            raise ValueError(
                f"{sorted(images)} are all channels that the model generates, so training must drop each at times; "
                f"give condition_dropout a rate above 0 for {', '.join(always)}"
            )

    @property
    def names(self) -> list[str]:
        """The names of all conditions."""
        return [*(["mask"] if self.mask else []), *self.classes, *self.numbers, *dict(self.images)]

    @property
    def image_columns(self) -> list[str]:
        """The image that each channel of the condition "image" belongs to."""
        return image_columns(dict(self.images))

    @property
    def columns(self) -> dict[str, Sequence[str]]:
        """The name of each column, for the conditions that have columns."""
        return {"classes": self.classes, "numbers": self.numbers, "image": self.image_columns}


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of one batch, as keyword arguments of the U-Net; None for those that are not used.

    Attributes:
        classes: int64 (B, n), the index of each class's value; -1 where absent.
        numbers: (B, m), NaN where absent.
        mask: folded ids (B, h, w, d, r), or embedded (B, mask_width, h, w, d); 0 where absent.
        image: (B, k, h, w, d) from `fold_images`; 0 where absent.
    """

    classes: Tensor | None = None
    numbers: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None

    def as_kwargs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the U-Net. Their order is the order in which `drop_conditions` draws random
        numbers.
        """
        tensors = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditions":
        """Apply a function to each tensor."""
        return Conditions(**{name: function(tensor) for name, tensor in self.as_kwargs().items()})

    def to(self, *args: Any, **kwargs: Any) -> "Conditions":
        """Move all tensors, as `Tensor.to` does; Accelerate moves batches by it."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> "Conditions":
        """Pin all tensors, as `Tensor.pin_memory` does; the data loader pins batches by it."""
        return self.map(Tensor.pin_memory)

    def names(self, schema: ConditionSchema) -> list[str]:
        """Return the names of the conditions that are present."""
        return list(dict.fromkeys(name for key in self.as_kwargs() for name in schema.columns.get(key, (key,))))

    def drop(self, names: Collection[str], schema: ConditionSchema) -> "Conditions":
        """Return a copy without the conditions of `names`."""
        kept: dict[str, Tensor] = {}
        for key, tensor in self.as_kwargs().items():
            columns = schema.columns.get(key)
            if columns is None:
                kept[key] = torch.full_like(tensor, ABSENT[key]) if key in names else tensor
                continue
            absent = torch.tensor([name in names for name in columns], device=tensor.device)
            absent = absent.view(-1, *[1] * (tensor.ndim - 2))
            kept[key] = torch.where(absent, torch.full_like(tensor, ABSENT[key]), tensor)
        return Conditions(**kept)

    def where(self, rows: Tensor, others: "Conditions") -> "Conditions":
        """Take these samples where `rows` (B,) is True, and those of `others`, which has the same conditions,
        elsewhere.
        """
        mine = self.as_kwargs()
        chosen = {
            key: torch.where(rows.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1)), mine[key], tensor)
            for key, tensor in others.as_kwargs().items()
        }
        return Conditions(**chosen)

    @staticmethod
    def stack(batches: Sequence["Conditions"]) -> "Conditions":
        """Join several, which have the same conditions, into one batch."""
        kwargs = [batch.as_kwargs() for batch in batches]
        return Conditions(**{key: torch.cat([tensors[key] for tensors in kwargs]) for key in kwargs[0]})


UNCONDITIONED = ConditionSchema()


def drop_conditions(
    conditions: Conditions,
    schema: ConditionSchema,
    rates: Mapping[str, float],
    generator: torch.Generator | Sequence[torch.Generator],
) -> Conditions:
    """Drop each condition of each sample with its own probability, independently, for training.

    Conditions that `rates` lacks are never dropped. With several generators, there is one per sample. If a sample would
    keep all channels of the model as conditions, all its images are dropped; otherwise nothing would be left to
    predict.
    """
    dropped = conditions
    for name in conditions.names(schema):
        rate = rates.get(name, 0.0)
        if not rate:
            continue
        batch = len(next(iter(conditions.as_kwargs().values())))
        sources = [(batch, generator)] if isinstance(generator, torch.Generator) else [(1, own) for own in generator]
        uniform = torch.cat([torch.rand(count, generator=source, device=source.device) for count, source in sources])
        dropped = dropped.drop({name}, schema).where(uniform < rate, dropped)
    if schema.images_are_all and dropped.image is not None:
        without = dropped.drop([name for name, _ in schema.images], schema)
        dropped = without.where(_all_images_given(dropped.image, schema), dropped)
    return dropped


def _all_images_given(image: Tensor, schema: ConditionSchema) -> Tensor:
    """Return a boolean (B,): True for samples whose images are all present."""
    columns = schema.image_columns
    flags = [i for i, name in enumerate(columns) if i + 1 == len(columns) or columns[i + 1] != name]
    return (image[:, flags].flatten(2) != 0).any(2).all(1)
