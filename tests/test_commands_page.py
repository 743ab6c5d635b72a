"""docs/cli.md: its commands run one after the other, and print what the page says, but for numbers of a machine."""

import re
import shlex
from pathlib import Path

import pytest

from .loopback_hub import loopback_hub
from .test_commands_hub import commands

PAGE = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|text|python)\n(.*?)```", PAGE, flags=re.DOTALL)


def masked(text):
    """Without what differs between machines: losses, times, hashes and the Hub's address."""
    text = re.sub(r"https?://[\w.:]+/", "HUB/", text)
    text = re.sub(r"\b(?=\w*\d)[0-9a-f]{12,}\b", "HASH", text)
    text = re.sub(r"after [\d.]+ (ms|s|min)\b", "after TIME", text)
    return re.sub(r" +", " ", re.sub(r"\d+(\.\d+)?", "#", text))


@pytest.mark.hub
def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(text)[1:] for kind, text in BLOCKS if kind == "bash"]
    for kind, text in BLOCKS:
        if kind == "python":
            exec(text, {})
    with loopback_hub() as hub:
        found = commands(hub, tmp_path / "home", *lines)
    expected = [text for kind, text in BLOCKS if kind == "text"]
    assert len(lines) == len(expected) == 8
    for line, (code, out, err), text in zip(lines, found, expected, strict=True):
        assert code == 0, (line, err)
        if line[0] == "compare":  # which of two arms is ahead by a thousandth is not the same everywhere
            out, text = ("\n".join(sorted(part.split()[0] for part in s.splitlines() if part)) for s in (out, text))
        assert masked(out) == masked(text), line
    assert masked("1,348 in 4 tensors") != masked("1,348 in 4 tensor")


def test_the_settings_on_the_page_are_some(tmp_path):
    from hf_sl2o.commands.meta_train import _defaults
    from hf_sl2o.commands.settings import read_settings

    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "settings.yaml").write_text(text)
    found = read_settings(tmp_path / "settings.yaml", list(_defaults()))
    assert found["meta_learning_rate"] == 0.01 and found["tasks"] == ["teacher", "digits-mlp"]
