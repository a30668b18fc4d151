"""Texts of settings: every setting has one, and `--help` and `--print_config` show it."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

import evaluate
from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
from cli.config_files import section_class
from cli.explained import argument_texts, as_yaml, commented, default_of, first_sentence, summary
from cli.settings import PositiveInt, UserPath, checked, describe, hints_of
from diffusion import LatentUNet3D
from files.documents import load_settings
from training import AdversarialConfig, OptimizerConfig, TrainLdmConfig, TrainVaeConfig, parse_config

ROOT = Path(__file__).resolve().parents[2]


@dataclass
@checked
class Inner:
    """An inner section. It has two settings.

    Args:
        low, high: the ends,
            50 % of them: in mm.
    """

    low: PositiveInt = 1
    high: PositiveInt | None = None


@dataclass
@checked
class Outer:
    """Settings of a test.

    Not of any program.

    Args:
        output: where it is written.
        inner: an inner section.
        names: texts by number.
    Raises: nothing.
    """

    output: UserPath
    inner: Inner = field(default_factory=lambda: Inner(low=3))
    names: dict[int, str] = field(default_factory=dict)


def sections_below(owner: type) -> set[type]:
    found = {owner}
    for hint in hints_of(owner).values():
        if (section := section_class(hint)) is not None:
            found |= sections_below(section)
    return found


def test_texts_are_read_from_docstrings():
    assert argument_texts(Inner) == dict.fromkeys(("low", "high"), "the ends, 50 % of them: in mm.")
    assert list(argument_texts(Outer)) == ["output", "inner", "names"]
    assert summary(Outer) == "Settings of a test.\n\nNot of any program." and argument_texts(int) == {}
    assert first_sentence(Inner) == "An inner section" and first_sentence(Outer) == "Settings of a test"


def test_every_setting_has_a_text():
    """Of all sections of the two configs, and of the models' constructors."""
    owners = sections_below(TrainVaeConfig) | sections_below(TrainLdmConfig)
    assert {"LoopConfig", "IntensityScaling", "PhantomConfig", "LoraConfig"} <= {owner.__name__ for owner in owners}
    for owner in (*owners, AutoencoderKL3D, VQGAN3D, SpaceToDepth3D, LatentUNet3D):
        texts = argument_texts(owner)
        assert list(texts) and set(texts) == set(hints_of(owner)), owner
        assert all(len(text) > 10 for text in texts.values()), owner
        assert summary(owner), owner


def plain(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("owner", [TrainVaeConfig, TrainLdmConfig])
def test_the_help_shows_every_setting(owner, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_config(owner, ["--help"])
    shown = plain(capsys.readouterr().out)
    for section in sections_below(owner):
        for name, hint in hints_of(section).items():
            text = argument_texts(section)[name]
            if section_class(hint) is None:  # sections are headed by what their class is
                assert plain(f"{text} [{describe(hint)}; {default_of(section, name)}]") in shown, (section, name)
    assert plain("loop: Length, precision and rhythm of a run") in shown and "<class" not in shown


def test_the_help_of_an_evaluation_shows_the_data_settings(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["dice", "--help"])
    shown = plain(capsys.readouterr().out)
    assert plain("voxel size in mm to which everything is resampled") in shown
    assert plain("phantom.count: how many volumes, each its own subject. [a whole number, 1 or more;") in shown


def test_defaults_in_words():
    assert default_of(Outer, "output") == "required"
    assert default_of(Outer, "inner") == "default: {low: 3}"
    assert default_of(AdversarialConfig, "optimizer") == (
        "default: {algorithm: adamw, learning_rate: 0.0002, betas: [0.5, 0.9]}"
    )
    assert default_of(VQGAN3D, "num_codes") == "default: 2048"
    values = [True, None, 1e-8, 0.0, (1, 2), {"a": [False]}, "text", OptimizerConfig()]
    assert [as_yaml(value) for value in values] == [
        *("true", "null", "1e-08", "0.0", "[1, 2]", "{a: [false]}", "text", "{}"),
    ]


def test_comments_stand_above_their_settings_and_change_nothing():
    values = {"output": "a: b", "inner": {"low": 3, "high": None}, "names": {0: "zero", -1: "1e5"}, "other": ["x\ny"]}
    text = commented(values, Outer)
    assert load_settings(text) == values
    lines = text.splitlines()
    for number, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        if name in ("output", "inner", "low", "high", "names"):
            assert lines[number - 1].strip().startswith("#"), line
    assert "  # the ends, 50 % of them: in mm. [a whole number, 1 or more]\n  low: 3" in text
    assert commented(values, None) == yaml.safe_dump(values, sort_keys=False).replace("1e5", "'1e5'")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_printed_config_is_the_same_config(path, capsys, tmp_path, monkeypatch):
    if path.stem == "data" or path.parent.name == "accelerate":
        pytest.skip("no config of a training")
    monkeypatch.chdir(tmp_path)
    owner = TrainLdmConfig if "\nvae:" in path.read_text() else TrainVaeConfig
    words = ["--config", str(path)]
    with pytest.raises(SystemExit):
        parse_config(owner, [*words, "--print_config"])
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    assert parse_config(owner, ["--config", "printed.yaml"]) == parse_config(owner, words)
    settings = [line.strip() for line in text.splitlines()]
    for fields in dataclasses.fields(owner):  # a comment above each
        at = next(number for number, line in enumerate(text.splitlines()) if line.startswith(f"{fields.name}:"))
        assert settings[at - 1].startswith("# "), fields.name
    if "distill" not in path.stem:  # a student has its teacher's model
        own = "# numbers in a code." if "VQGAN3D" in text else "# width of each level, finest first."
        assert f"  {own} [" in text  # of the model's arguments, too
    assert max(map(len, text.splitlines())) <= 120
