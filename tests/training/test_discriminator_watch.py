"""A discriminator that wins or guesses in all reports is told of, one that teaches is not."""

import pytest
from helpers.vae_steps import make_step

from training import AdversarialConfig
from training.vae_losses import WATCHED, DiscriminatorWatch

# Means of 5 steps each in the first 120 steps of configs/hippocampus/sharpen.yaml.
HEALTHY = [1.0431, 1.0378, 1.0511, 1.0455, 1.0347, 1.0211, 1.0167, 1.0098, 1.0226, 1.0044, 0.9987, 0.9969]
HEALTHY += [0.9987, 0.9972, 0.9949, 0.9859, 0.9911, 0.9864, 0.9849, 0.9831, 0.9871, 0.9808, 0.9855, 0.9838]


def told(losses):
    watch = DiscriminatorWatch()
    return [fault for fault in map(watch, losses) if fault]


@pytest.mark.parametrize(
    ("losses", "words"), [([0.01] * WATCHED, "discriminator wins"), ([1.0002, 0.9998] * 5, "discriminator guesses")]
)
def test_a_standstill_is_told_once_in_so_many_reports(losses, words):
    assert told(losses[1:]) == []
    (fault,) = told(losses)
    assert words in fault and "adversarial.optimizer.learning_rate" in fault
    assert len(told(losses * 2)) == 2


@pytest.mark.parametrize("losses", [HEALTHY * 3, [0.01] * (WATCHED - 1) + [0.3] * WATCHED, [0.5, 0.0] * WATCHED])
def test_a_discriminator_that_teaches_is_not_told_of(losses):
    assert told(losses) == []


def test_the_training_step_watches_its_discriminator():
    step = make_step(adversarial=AdversarialConfig(channels=4, layers=1))
    reports = [step.review({"loss": 0.1, "discriminator": 0.01}) for _ in range(WATCHED)]
    assert reports[:-1] == [[]] * (WATCHED - 1) and "the discriminator wins" in reports[-1][0]
    assert step.review({"loss": 0.1}) == [] and make_step().review({"loss": 0.1, "discriminator": 0.01}) == []
