"""push_to_hub and from_pretrained with the real client in a fresh process, as a user's: environment and tracebacks."""

import os
import subprocess
import sys

import pytest

from hf_sl2o import LSTMRule, Rule, RuleConfig

from .loopback_hub import TOKEN, loopback_hub

pytestmark = pytest.mark.hub


@pytest.fixture
def hub():
    with loopback_hub() as server:
        yield server


def python(hub, home, code, token=TOKEN):
    """Runs code as a user would, with an own cache."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    if token:
        env["HF_TOKEN"] = token
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_a_fresh_process_pushes_and_loads(hub, tmp_path):
    rule = LSTMRule(RuleConfig(hidden_size=4))
    rule.save_pretrained(tmp_path / "rule")
    hub.lfs = True
    out = python(
        hub,
        tmp_path / "home",
        "from hf_sl2o import Rule\n"
        f"Rule.from_pretrained({str(tmp_path / 'rule')!r}).push_to_hub('user/rule')\n"
        "print(Rule.from_pretrained('user/rule').fingerprint)\n",
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == [rule.fingerprint]
    assert [path for path in hub.large.values()] == [(tmp_path / "rule" / "model.safetensors").read_bytes()]


def test_the_first_thing_a_user_sees_is_the_sentence(hub, tmp_path):
    LSTMRule().save_pretrained(tmp_path / "rule")
    code = "from hf_sl2o import Rule\nrule = Rule.from_pretrained({!r})\nrule.push_to_hub('user/new')"
    loaded = python(hub, tmp_path / "home", code.format("user/absent"))
    pushed = python(hub, tmp_path / "home", code.format(str(tmp_path / "rule")), token=None)
    for out, kind, words in (
        (loaded, "FileNotFoundError", "looked for a saved Rule at 'user/absent'"),
        (pushed, "PermissionError", "could not push to 'user/new'"),
    ):
        assert out.returncode == 1 and out.stderr.count("Traceback") == 1, out.stderr
        assert "huggingface_hub/" not in out.stderr  # no frame of the client's
        assert out.stderr.splitlines()[-1].startswith(f"{kind}: {words}")
    assert "user/new" not in hub.repos and isinstance(Rule.from_pretrained(tmp_path / "rule"), LSTMRule)
