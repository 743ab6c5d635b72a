"""What the Hub or a repository refuses, and what is refused of it: one sentence each, and nothing is left half."""

import json
import struct

import pytest

from hf_sl2o import Basis, LSTMRule, Rule, RuleConfig

from .hub_client import api, counted, use
from .loopback_hub import OTHER_TOKEN, TOKEN, loopback_hub
from .test_hub_protocol import dense, same_bits

pytestmark = pytest.mark.hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with loopback_hub() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture
def rule():
    return LSTMRule(RuleConfig(hidden_size=4))


# Who may


def test_private_repositories(hub, rule, monkeypatch, tmp_path):
    rule.push_to_hub("user/secret", private=True)
    assert hub.repos["user/secret"].private
    same_bits(Rule.from_pretrained("user/secret"), rule)
    fresh = {"cache_dir": tmp_path / "fresh"}
    same_bits(Rule.from_pretrained("user/secret", token=TOKEN, **fresh), rule)
    fresh = {"cache_dir": tmp_path / "fresher"}
    with pytest.raises(FileNotFoundError, match=r"private and the token that was sent may not see it \(404\)"):
        Rule.from_pretrained("user/secret", token=OTHER_TOKEN, **fresh)
    with pytest.raises(FileNotFoundError, match=r"private and no token was sent \(401\).*hf auth login"):
        Rule.from_pretrained("user/secret", token=False, **fresh)
    with pytest.raises(FileNotFoundError, match=r"does not know the token that was sent \(401\); log in again"):
        Rule.from_pretrained("user/secret", token="hf_wrong", **fresh)
    assert not [path for path in (tmp_path / "fresher").rglob("*") if path.name == "config.json"]


def test_a_token_that_no_longer_works_uses_the_cache_and_says_so(hub, rule, caplog, monkeypatch):
    rule.push_to_hub("user/rule")
    Rule.from_pretrained("user/rule")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    same_bits(Rule.from_pretrained("user/rule"), rule)
    assert "taken from the cache" in caplog.text and "does not know the token" in caplog.text


def test_pushes_that_are_refused_change_nothing(hub, rule, monkeypatch):
    rule.push_to_hub("user/rule")
    before = list(hub.repos["user/rule"])
    other = LSTMRule(RuleConfig(hidden_size=6))
    with pytest.raises(
        PermissionError, match=r"'user/rule': the token.* does not allow that \(403\).*no file there was"
    ):
        other.push_to_hub("user/rule", token=OTHER_TOKEN)
    with pytest.raises(PermissionError, match=r"does not know the token that was sent \(401\)"):
        other.push_to_hub("user/rule", token="hf_wrong")
    with pytest.raises(PermissionError, match=r"no token was sent \(401\); log in with `hf auth login`"):
        other.push_to_hub("user/new", token=False)
    with pytest.raises(ValueError, match="there and public, and private=True was asked for"):
        other.push_to_hub("user/rule", private=True)
    with pytest.raises(ValueError, match="repo_id is 'a/b/c', expected 'user/name'"):
        other.push_to_hub("a/b/c")
    assert list(hub.repos["user/rule"]) == before and set(hub.repos) == {"user/rule"}


# Something else


def test_what_is_no_rule_is_said_before_weights_are_fetched(hub, rule, tmp_path):
    basis = dense()
    basis.push_to_hub("user/basis")
    rule.push_to_hub("user/rule")
    hub.put("user/model", config__json=b'{"model_type": "gpt2", "n_layer": 2}', model__safetensors=b"x" * 1000)
    hub.put("user/adapter", adapter_config__json=b'{"peft_type": "LORA"}')
    hub.put("datasets/user/data", README__md=b"rows")
    hub.put("spaces/user/demo", app__py=b"print()")
    with counted(hub) as requests:
        for name, words in (
            ("model", r"config.json is that of a model \(model_type 'gpt2'\), not of a Rule"),
            ("basis", "config.json is that of a Basis, not of a Rule; use Basis.from_pretrained"),
        ):
            with pytest.raises(ValueError, match=words):
                Rule.from_pretrained(f"user/{name}")
        with pytest.raises(ValueError, match="that of a Rule, not of a Basis; use Rule.from_pretrained"):
            Basis.from_pretrained("user/rule")
        for name, words in (
            ("adapter", "the repository is there and has no config.json"),
            ("data", "it is a data set on the Hub, not a Rule"),
            ("demo", "it is a space on the Hub, not a Rule"),
            ("absent", r"there is no such repository, or it is private.*\(404\)"),
        ):
            with pytest.raises(FileNotFoundError, match=words):
                Rule.from_pretrained(f"user/{name}")
    assert not any("model.safetensors" in line for line in requests)
    with pytest.raises(FileNotFoundError, match="no local folder .*and no name of a Hub repository"):
        Rule.from_pretrained(tmp_path / "no" / "such" / "folder")
    api(hub).delete_repo("user/rule")
    with pytest.raises(FileNotFoundError, match="there is no such repository"):
        Rule.from_pretrained("user/rule")


def test_a_later_format_is_refused(hub, rule, tmp_path):
    rule.save_pretrained(tmp_path / "rule")
    weights = (tmp_path / "rule" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "rule" / "config.json").read_text())
    del config["checksum"]
    for version, number in (("later", 2), ("odd", "1"), ("flag", True)):
        text = json.dumps({**config, "format_version": number, "layers": []}).encode()
        hub.put(f"user/{version}", config__json=text, model__safetensors=weights)
        with pytest.raises(
            ValueError, match=rf'"format_version": {number!r}, this hf_sl2o reads 1.*--upgrade hf_sl2o'
        ):
            Rule.from_pretrained(f"user/{version}")
    hub.put("user/key", config__json=json.dumps({**config, "layers": []}).encode(), model__safetensors=weights)
    with pytest.raises(ValueError, match="unknown key 'layers'; it was written by a newer hf_sl2o"):
        Rule.from_pretrained("user/key")


def test_headers_that_claim_more_than_the_file_holds(hub, rule, tmp_path):
    rule.save_pretrained(tmp_path / "rule")
    config = json.loads((tmp_path / "rule" / "config.json").read_text())
    del config["sha256"], config["checksum"]
    small, huge = json.dumps(config).encode(), 1 << 50
    header = json.dumps({"lstm": {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}}).encode()
    false = {
        "header": struct.pack("<Q", 1 << 60) + b"{}",
        "tensor": struct.pack("<Q", len(header)) + header + b"\0" * 16,
    }
    for name, weights in false.items():
        hub.put(f"user/{name}", config__json=small, model__safetensors=weights)
        with pytest.raises(ValueError, match="truncated, damaged or not a safetensors file.*download it again"):
            Rule.from_pretrained(f"user/{name}")
    wide = json.dumps({**config, "rule": {**config["rule"], "hidden_size": 1 << 40}}).encode()
    hub.put("user/wide", config__json=wide, model__safetensors=(tmp_path / "rule" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="config.json|model.safetensors"):
        Rule.from_pretrained("user/wide")
