"""push_to_hub and from_pretrained with the real client, in fresh processes, against a Hub on the loopback device."""

import os
import subprocess
import sys

import pytest
import torch

from hf_sl2o import Basis, LSTMRule, RandomBasis, Rule, RuleConfig

from .conftest import random_dense
from .loopback_hub import TOKEN, loopback_hub

pytestmark = pytest.mark.hub


@pytest.fixture
def hub():
    with loopback_hub() as server:
        yield server


def python(hub, home, code, token=TOKEN, check=True, offline=False):
    """Runs code as a user would, with an own cache."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    if token:
        env["HF_TOKEN"] = token
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    if check:
        assert out.returncode == 0, out.stderr[-2000:]
    return out


def test_pushed_and_loaded_rules_and_bases_are_equal(hub, tmp_path):
    rule, other = LSTMRule(RuleConfig(hidden_size=4)), LSTMRule(RuleConfig(hidden_size=4))
    basis = random_dense([("w", torch.nn.Parameter(torch.zeros(5, 6)))], dim=3)
    seeded = RandomBasis(basis.layout, 3, seed=9)
    rule.save_pretrained(tmp_path / "rule")
    other.save_pretrained(tmp_path / "other")
    basis.save_pretrained(tmp_path / "basis")
    seeded.save_pretrained(tmp_path / "seeded")
    python(
        hub,
        tmp_path / "home",
        "from hf_sl2o import Basis, Rule\n"
        f"Rule.from_pretrained({str(tmp_path / 'other')!r}).push_to_hub('user/rule')\n"
        f"Rule.from_pretrained({str(tmp_path / 'rule')!r}).push_to_hub('user/rule')\n"
        f"Rule.from_pretrained({str(tmp_path / 'rule')!r}).push_to_hub('user/rule')\n"  # again, unchanged
        f"Basis.from_pretrained({str(tmp_path / 'basis')!r}).push_to_hub('user/basis', private=True)\n"
        f"Basis.from_pretrained({str(tmp_path / 'seeded')!r}).save_pretrained({str(tmp_path / 'again')!r},"
        " repo_id='user/seeded', push_to_hub=True)\n",
    )
    first = hub.repos["user/rule"][1][0]
    hub.put("user/rule", evil__py=b"raise SystemExit(3)", model__pkl=b"cos\nsystem\n(S'false'\ntR.")
    hub.log.clear()
    loaded = python(
        hub,
        tmp_path / "fresh",
        "from hf_sl2o import Basis, Rule\n"
        "rule = Rule.from_pretrained('user/rule')\n"
        f"old = Rule.from_pretrained('user/rule', revision={first!r})\n"
        "print(type(rule).__name__, rule.fingerprint, old.fingerprint)\n"
        "print(Basis.from_pretrained('user/basis').as_matrix().double().sum().item())\n"
        "print(Basis.from_pretrained('user/seeded').fingerprint)\n",
    ).stdout.split()
    assert loaded[:3] == ["LSTMRule", rule.fingerprint, other.fingerprint] and rule.fingerprint != other.fingerprint
    assert float(loaded[3]) == basis.as_matrix().double().sum().item() and loaded[4] == seeded.fingerprint
    fetched = {line.rpartition("/")[2] for line in hub.log}
    assert fetched == {"config.json", "model.safetensors"}  # nothing else is even asked for
    card = hub.repos["user/rule"][-1][1]["README.md"].decode()
    assert card.startswith("---\n") and "library_name: hf_sl2o" in card and "- learned-optimizer" in card
    assert str(tmp_path) not in card and "license" not in hub.repos["user/basis"][-1][1]["README.md"].decode()
    # from the cache, with the Hub gone
    offline = python(
        hub,
        tmp_path / "fresh",
        "from hf_sl2o import Rule; print(Rule.from_pretrained('user/rule', local_files_only=True).fingerprint)",
        offline=True,
    )
    assert offline.stdout.strip() == rule.fingerprint


def test_what_is_missing_refused_or_damaged_is_said(hub, tmp_path):
    LSTMRule().save_pretrained(tmp_path / "rule")
    config = (tmp_path / "rule" / "config.json").read_bytes()
    weights = (tmp_path / "rule" / "model.safetensors").read_bytes()
    changed = bytearray(weights)
    changed[-1] ^= 1
    hub.put("user/tampered", config__json=config, model__safetensors=bytes(changed))
    hub.put("user/truncated", config__json=config, model__safetensors=weights[:-20])
    hub.put("user/incomplete", config__json=config)
    hub.put("user/good", config__json=config, model__safetensors=weights)
    out = python(
        hub,
        tmp_path / "home",
        "from hf_sl2o import Rule\n"
        "for name in ('good', 'absent', 'incomplete', 'tampered', 'truncated'):\n"
        "    try: print(name, 'ok', Rule.from_pretrained(f'user/{name}').fingerprint)\n"
        "    except Exception as e: print(name, type(e).__name__, str(e).replace(chr(10), ' '))\n"
        "try: Rule.from_pretrained('user/good', revision='f' * 40)\n"
        "except Exception as e: print('revision', type(e).__name__, str(e).replace(chr(10), ' '))\n"
        f"rule = Rule.from_pretrained({str(tmp_path / 'rule')!r})\n"
        "try: rule.push_to_hub('stranger/rule')\n"
        "except Exception as e: print('push', type(e).__name__, str(e).replace(chr(10), ' '))\n",
    )
    lines = dict(line.split(" ", 1) for line in out.stdout.splitlines())
    assert lines["good"] == f"ok {Rule.from_pretrained(tmp_path / 'rule').fingerprint}"
    assert "FileNotFoundError looked for a saved Rule at 'user/absent'" in lines["absent"]
    assert "FileNotFoundError" in lines["incomplete"] and "model.safetensors" in lines["incomplete"]
    assert "sha256" in lines["tampered"] and "sha256" in lines["truncated"]
    assert "(revision ffff" in lines["revision"] and "403" in lines["push"]
    anonymous = python(
        hub,
        tmp_path / "anonymous",
        f"from hf_sl2o import Basis, Rule; Rule.from_pretrained({str(tmp_path / 'rule')!r}).push_to_hub('user/new')",
        token=None,
        check=False,
    )
    assert anonymous.returncode == 1 and "401" in anonymous.stderr and "user/new" not in hub.repos
    assert isinstance(Rule.from_pretrained(tmp_path / "rule"), LSTMRule) and issubclass(RandomBasis, Basis)
