"""`hf-sl2o push` and `pull` with the real client, against a Hub on the loopback device, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sl2o import LSTMRule, RandomBasis, RuleConfig, SubspaceOptimizer
from hf_sl2o.training.finetuned import FineTune

from .conftest import random_dense
from .loopback_hub import TOKEN, loopback_hub

pytestmark = pytest.mark.hub

ROOT = Path(__file__).parent.parent
RUN = """
import contextlib, io, json, os, sys
sys.path.insert(0, {root!r})
from hf_sl2o_command import main
for words in json.loads(sys.argv[1]):
    token, words = words[0], words[1:]
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {{"HF_TOKEN": token}} if token else {{}}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture
def hub():
    with loopback_hub() as server:
        yield server


def commands(hub, home, *lines, offline=False):
    """Exit code, stdout and the last line of stderr of each command; an own cache. A first word may be a token."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    given = [[*line] if line[0] in ("", "hf_wrong") else [TOKEN, *line] for line in lines]
    words = [sys.executable, "-c", RUN.format(root=str(ROOT)), json.dumps(given)]
    done = subprocess.run(words, env=env, cwd=home.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(lines)
    return [(code, out, (err.strip().splitlines() or [""])[-1]) for code, out, err in found]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finetune(folder):
    """A fine-tune with its basis and a rule beside it."""

    def base():
        torch.manual_seed(0)
        return torch.nn.Linear(6, 5)

    model = base()
    optimizer = SubspaceOptimizer(model, random_dense(model.named_parameters()), lambda c: torch.optim.SGD(c, lr=0.1))
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    made = FineTune.settle(optimizer, base())
    made.save_pretrained(folder)
    return made


def test_what_is_pushed_comes_back_to_the_bit(hub, tmp_path):
    rule = LSTMRule(RuleConfig(hidden_size=4))
    basis = random_dense([("w", torch.nn.Parameter(torch.zeros(5, 6)))], dim=3)
    seeded = RandomBasis(basis.layout, 3, seed=9)
    for made, name in ((rule, "rule"), (basis, "basis"), (seeded, "seeded")):
        made.save_pretrained(tmp_path / name)
    finetune(tmp_path / "tuned")
    # a card of one's own
    (tmp_path / "rule" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    (tmp_path / "rule" / "notes.txt").write_text("private")
    names = ("rule", "basis", "seeded", "tuned")
    pushed = commands(
        hub,
        tmp_path / "home",
        *(["push", name, f"user/{name}", "--json"] for name in names),
        ["push", "rule", "user/rule"],
        ["push", "basis", "user/hidden", "--private"],
        ["push", "seeded", "user/basis", "--revision", "seeded"],
    )
    assert [code for code, _, _ in pushed] == [0] * 7, pushed
    facts = json.loads(pushed[0][1])
    assert facts["fingerprint"] == rule.fingerprint and facts["kind"] == "rule" and not facts["private"]
    assert facts["left_out"] == ["notes.txt"] and "notes.txt" not in hub.repos["user/rule"].at("main")[1]
    assert hub.repos["user/rule"].at("main")[1]["README.md"].startswith(b"---\nlicense: mit")
    assert "Not uploaded, as no part of the rule: notes.txt." in pushed[4][1]
    assert hub.repos["user/hidden"].private and "(private)" in pushed[5][1]
    hub.put("user/rule", evil__py=b"raise SystemExit(3)", model__pkl=b"cos\nsystem\n(S'false'\ntR.")
    hub.log.clear()
    pulled = commands(
        hub,
        tmp_path / "fresh",
        *(["pull", f"user/{name}", f"got/{name}", "--json"] for name in names),
        ["pull", "user/hidden", "got/hidden"],
        ["pull", "user/basis", "got/branch", "--revision", "seeded"],
        ["inspect", "user/basis"],
        ["inspect", "user/tuned", "--json"],
        ["pull", "user/rule", "got/rule"],
    )
    assert [code for code, _, _ in pulled] == [0] * 8 + [2], pulled
    assert not [line for line in hub.log if "evil" in line or "pkl" in line]
    (tmp_path / "rule" / "notes.txt").unlink()
    for name, source in {**dict.fromkeys(names), "hidden": "basis", "branch": "seeded"}.items():
        assert contents(tmp_path / "got" / name) == contents(tmp_path / (source or name)), name
    assert json.loads(pulled[0][1])["commit"] == hub.repos["user/rule"].at("main")[0]
    assert "3, dense, float32" in pulled[6][1] and basis.fingerprint in pulled[6][1]
    assert json.loads(pulled[7][1])["has_basis"] and json.loads(pulled[7][1])["dim"] == 6
    assert "a folder that is not empty, and nothing is overwritten" in pulled[8][2]
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == sorted([*names, "hidden", "branch"])
    # the Hub is gone: the cache has it
    again = commands(
        hub, tmp_path / "fresh", ["pull", "user/basis", "got/later"], ["pull", "user/none", "got/none"], offline=True
    )
    assert again[1][0] == 1 and "HF_HUB_OFFLINE is set" in again[1][2]
    assert again[0][0] == 0, again
    assert contents(tmp_path / "got" / "later") == contents(tmp_path / "basis")


def test_a_fine_tune_beside_a_trainers_weights(hub, tmp_path):
    finetune(tmp_path / "tuned")
    beside = {f"sl2o/{name}": data for name, data in contents(tmp_path / "tuned").items()}
    hub.put("user/trained", config__json=b'{"model_type": "gpt2"}', model__safetensors=b"gigabytes", **beside)
    lines = ["pull", "user/trained", "got"], ["inspect", "user/trained", "--json"]
    pulled, inspected = commands(hub, tmp_path / "home", *lines)
    assert pulled[0] == inspected[0] == 0, (pulled, inspected)
    assert contents(tmp_path / "got") == contents(tmp_path / "tuned")
    facts = json.loads(inspected[1])
    assert facts["kind"] == "fine-tune" and facts["dim"] == 6
    assert facts["commit"] == hub.repos["user/trained"].at("main")[0]
    assert not [line for line in hub.log if "model.safetensors" in line and "sl2o" not in line]


def test_what_is_refused_leaves_nothing(hub, tmp_path):
    LSTMRule().save_pretrained(tmp_path / "rule")
    finetune(tmp_path / "tuned")
    files = contents(tmp_path / "rule")
    config, weights = files["config.json"], files["model.safetensors"]
    changed = bytearray(weights)
    changed[-1] ^= 1
    hub.put("user/good", config__json=config, model__safetensors=weights)
    hub.put("user/tampered", config__json=config, model__safetensors=bytes(changed))
    hub.put("user/incomplete", config__json=config)
    hub.put("user/model", config__json=b'{"model_type": "gpt2"}')
    hub.put("user/empty", README__md=b"nothing")
    hub.put("other/secret", private=True, config__json=config, model__safetensors=weights)
    (tmp_path / "tuned" / "basis" / "model.safetensors").write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    said = {
        ("pull", "user/tampered", "got"): (2, "sha256"),
        ("pull", "user/incomplete", "got"): (2, "user/incomplete, which has no model.safetensors"),
        ("pull", "user/model", "got"): (2, "config.json of the repository user/model is of something else; expected"),
        ("pull", "user/empty", "got"): (2, "the repository is there and has no config.json"),
        ("pull", "other/secret", "got"): (2, "no such repository, or it is private and the token that was sent may"),
        ("pull", "user/absent", "got"): (2, "no such repository, or it is private"),
        ("pull", "user/good", "got", "--revision", "v9"): (2, "the repository has no revision 'v9'; check the name"),
        ("pull", "user/good", "rule"): (2, "OUTPUT is rule, a folder that is not empty"),
        ("pull", "user//good", "got"): (2, "REPO is 'user//good', expected the id"),
        ("pull", "../good", "got"): (2, "REPO is '../good', expected the id"),
        ("push", "rule", "other/rule"): (1, "the token that was sent does not allow that (403)"),
        ("push", "rule", "user/good", "--private"): (2, "user/good is there and public, and private=True"),
        ("push", "nothing", "user/new"): (2, "FOLDER is nothing, which is not there"),
        ("push", "empty", "user/new"): (2, "empty is a folder without config.json"),
        ("push", "tuned", "user/new"): (2, "basis"),
        ("", "push", "rule", "user/new"): (2, "there is no token of the Hub: set HF_TOKEN"),
        ("hf_wrong", "push", "rule", "user/new"): (1, "the Hub does not know the token that was sent (401)"),
        ("pull", "user/good", "whole"): (0, ""),
    }
    found = commands(hub, tmp_path / "home", *said)
    for words, (code, out, err) in zip(said, found, strict=True):
        assert code == said[words][0] and said[words][1] in err, (words, code, err)
        assert code == 0 or (not out and err.startswith("hf-sl2o"))
    assert "user/new" not in hub.repos and len(hub.repos["user/good"]) == 2
    assert not (tmp_path / "got").exists() and not list(tmp_path.glob(".*partial*"))
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == weights
