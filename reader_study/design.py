"""Which cases a reader sees, and in which order: a function of the cases, the salt, the seed and the reader.

The salt is in the key alone. Without it nobody can rebuild the order from the seed, which is 0 unless it is given.
"""

import hashlib
import hmac
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

QUARTERS = 4
REAL = "real"


@dataclass(frozen=True)
class StudyCase:
    """A volume of the study.

    Attributes:
        name: the file's name without its suffix.
        file: the file's path.
        source: "real", or the name of the model.
        mask_of: name of the real case whose mask a generated volume was generated from, if it is known.
    """

    name: str
    file: str
    source: str
    mask_of: str | None = None


@dataclass(frozen=True)
class Item:
    """What a reader sees at once.

    Attributes:
        id: a salted hash.
        section: "training", "single" or "pair".
        cases: positions in the list of cases: one, or the left and the right one of a pair.
        volumes: names of the files of their voxels, salted hashes too.
        repeat_of: id of the item that this one repeats.
    """

    id: str
    section: str
    cases: tuple[int, ...]
    volumes: tuple[str, ...]
    repeat_of: str | None = None


@dataclass(frozen=True)
class Plan:
    """How many cases of each kind a reader sees.

    Attributes:
        readers: number of readers.
        seed: of every choice.
        training: training cases, before the others.
        repeats: share of the cases that are shown twice.
        pairs: forced choices; fewer if fewer pairs share a mask.
    """

    readers: int = 2
    seed: int = 0
    training: int = 4
    repeats: float = 0.15
    pairs: int = 10

    def __post_init__(self) -> None:
        if self.repeats and not 0.1 <= self.repeats <= 0.2:
            raise ValueError(f"repeats: {self.repeats:g} of the cases; take 0, or 0.1 to 0.2")


@dataclass
class _Names:
    """Salted names of the items and volumes of a reader."""

    salt: bytes
    reader: str
    count: int = field(default=0)

    def new(self) -> str:
        self.count += 1
        text = f"{self.reader}/{self.count}".encode()
        return hmac.new(self.salt, text, hashlib.sha256).hexdigest()[:16]


def _dice(salt: bytes, purpose: str) -> random.Random:
    """Return a generator that only who knows the salt can build again."""
    return random.Random(hmac.new(salt, f"order/{purpose}".encode(), hashlib.sha256).digest())


def reader_name(number: int) -> str:
    """Return the name of a reader, counted from 0."""
    return f"reader_{number + 1}"


def match_masks(real: Sequence[str], generated: str) -> str | None:
    """Return the longest name of a real case that equals or, followed by an underscore, begins a generated volume's."""
    stem = generated
    while stem not in real and "_" in stem:
        stem = stem.rpartition("_")[0]
    return stem if stem in real else None


def order_cases(cases: Sequence[StudyCase], plan: Plan, salt: bytes) -> dict[str, list[Item]]:
    """Return the items of each reader, in the order in which they are shown.

    Raises: ValueError for fewer than two real or generated cases beside the training cases.
    """
    dice = _dice(salt, f"{plan.seed}")
    by_source: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        by_source.setdefault(case.source, []).append(number)
    for numbers in by_source.values():
        dice.shuffle(numbers)
    training = _take_training(by_source, plan.training, dice)
    left = {source: len(numbers) for source, numbers in by_source.items()}
    if len(left) < 2 or min(left.values()) < 2:
        counts = ", ".join(f"{number} {source}" for source, number in left.items()) or "none"
        raise ValueError(
            f"beside the training cases are left: {counts}; two or more of real and of each generated set are "
            f"needed. Give more volumes, a smaller --training than {plan.training}, or a larger --most"
        )
    quarters: list[list[int]] = [[] for _ in range(QUARTERS)]
    turn = 0
    for numbers in by_source.values():
        for number in numbers:
            quarters[turn % QUARTERS].append(number)
            turn += 1
    pairs = _pairs(cases, by_source, plan.pairs, dice)
    return {
        reader_name(reader): _items(quarters, training, pairs, plan, reader, _Names(salt, reader_name(reader)))
        for reader in range(plan.readers)
    }


def _take_training(by_source: dict[str, list[int]], count: int, dice: random.Random) -> list[int]:
    """Remove the training cases from `by_source`, real and generated in turn."""
    fakes = [source for source in by_source if source != REAL]
    taken = []
    for place in range(count):
        source = REAL if place % 2 == 0 or not fakes else fakes[place // 2 % len(fakes)]
        if by_source.get(source):
            taken.append(by_source[source].pop())
    dice.shuffle(taken)
    return taken


def _pairs(
    cases: Sequence[StudyCase], by_source: dict[str, list[int]], count: int, dice: random.Random
) -> list[tuple[int, int]]:
    """Return (real, generated) of one mask each; no case is in two pairs."""
    real = {cases[number].name: number for number in by_source[REAL]}
    pairs, used = [], set()
    fakes = [number for source, numbers in by_source.items() if source != REAL for number in numbers]
    dice.shuffle(fakes)
    for number in fakes:
        partner = cases[number].mask_of
        if partner in real and partner not in used:
            used.add(partner)
            pairs.append((real[partner], number))
    return pairs[:count]


def _items(
    quarters: Sequence[Sequence[int]],
    training: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    plan: Plan,
    reader: int,
    names: _Names,
) -> list[Item]:
    dice = _dice(names.salt, f"{plan.seed}/{reader}")
    rotated = [list(quarters[(quarter + reader) % QUARTERS]) for quarter in range(QUARTERS)]
    for quarter in rotated:
        dice.shuffle(quarter)
    items = [Item(names.new(), "training", (number,), (names.new(),)) for number in training]
    shown = [[Item(names.new(), "single", (number,), (names.new(),)) for number in quarter] for quarter in rotated]
    early, later = shown[0] + shown[1], [list(shown[2]), list(shown[3])]
    count = min(round(plan.repeats * sum(map(len, shown))), len(early))
    for place, first in enumerate(dice.sample(early, count)):
        again = Item(names.new(), "single", first.cases, (names.new(),), repeat_of=first.id)
        half = later[place % 2]
        half.insert(dice.randrange(len(half) + 1), again)
    items += [*early, *later[0], *later[1]]
    sides = [place % 2 == 0 for place in range(len(pairs))]
    dice.shuffle(sides)
    for pair, straight in zip(dice.sample(list(pairs), len(pairs)), sides, strict=True):
        items.append(Item(names.new(), "pair", pair if straight else pair[::-1], (names.new(), names.new())))
    return items
