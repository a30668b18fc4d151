"""prepare.py: what it stores, says and returns."""

import yaml

import prepare
from files.cache import cache_root


def test_volumes_are_stored_and_counted(tmp_path, monkeypatch, capsys):
    """A cache without room for them is not called prepared."""
    config = tmp_path / "vae.yaml"
    config.write_text(yaml.safe_dump({"data": {"phantom": {"count": 3, "shape": [16, 16, 16]}}, "output": "run"}))
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", "1 B")
    assert prepare.main(["--config", str(config)]) == 1
    assert "0 of 3 volumes are prepared" in capsys.readouterr().out
    monkeypatch.delenv("MEDVOLUME_CACHE_LIMIT")
    assert prepare.main(["--config", str(config)]) == 0
    said = capsys.readouterr()
    assert "3 of 3 volumes are prepared" in said.out and "next: python " in said.err
    assert len(list((cache_root() / "prepared").glob("*.safetensors"))) == 3


def test_verification_does_not_call_removed_volumes_damaged(tmp_path, monkeypatch, caplog):
    """A cache that holds two of three volumes."""
    config = tmp_path / "vae.yaml"
    config.write_text(yaml.safe_dump({"data": {"phantom": {"count": 3, "shape": [16, 16, 16]}}, "output": "run"}))
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "cache"))
    prepare.main(["--config", str(config)])
    next((cache_root() / "prepared").glob("*.safetensors")).unlink()
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", "45 kB")
    assert prepare.main(["--config", str(config), "--verify"]) == 1
    assert "damaged" not in caplog.text
