"""What a reader is asked. The three scales are those of Khader et al. 2023, Table 1, to the letter.

Khader et al., "Denoising diffusion probabilistic models for 3D medical image generation", Scientific Reports 13, 7303.
"""

from dataclasses import dataclass

CHANCE = 0.5
CONFIDENCES = 5


@dataclass(frozen=True)
class Question:
    """A question with one answer.

    Attributes:
        name: of the answer in JSON.
        text: what the reader sees.
        keys: the keys that give the answers, which are also the answers' names in JSON.
        options: the answers' texts.
    """

    name: str
    text: str
    keys: tuple[str, ...]
    options: tuple[str, ...]


DECISION = Question("decision", "Is this volume real or generated?", ("R", "G"), ("Real", "Generated"))
CONFIDENCE = Question(
    "confidence",
    "How sure are you?",
    ("1", "2", "3", "4", "5"),
    ("Guess", "Unsure", "Fairly sure", "Sure", "Certain"),
)
LETTERS = ("A", "B", "C", "D")
SCALES = (
    Question(
        "appearance",
        "Realistic image appearance",
        LETTERS,
        (
            "Overall not recognizable as CT/MRI",
            "Overall unrealistic, but generally recognizable as CT/MRI",
            "Overall realistic and only minor unrealistic areas",
            "Can’t tell whether fake or not",
        ),
    ),
    Question(
        "consistency",
        "Consistency between slices",
        LETTERS,
        (
            "No consistent slices",
            "Only few (up to 3) slices are consistent",
            "Majority of slices (> 10) are consistent",
            "All slices are consistent",
        ),
    ),
    Question(
        "anatomy",
        "Anatomic correctness",
        LETTERS,
        (
            "Anatomic region not recognizable",
            "Anatomic region recognizable, but major parts of the images exhibit anatomic incorrectness",
            "Only minor anatomic incorrectness",
            "Anatomic features are correct",
        ),
    ),
)
CHOICE = Question("choice", "One of these two is real. Which?", ("L", "R"), ("Left", "Right"))
SINGLE = (DECISION, CONFIDENCE, *SCALES)
PAIR = (CHOICE, CONFIDENCE)


def asked(section: str) -> tuple[Question, ...]:
    """Return the questions of a section: "pair", or "training" and "single", which are alike."""
    return PAIR if section == "pair" else SINGLE
