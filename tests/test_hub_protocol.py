"""Rules and bases over the Hub's protocol: what arrives, what is asked for, and each way in which it can go wrong."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import snapshot_download

from hf_sl2o import Basis, Layout, LSTMRule, RandomBasis, Rule, RuleConfig
from hf_sl2o.foundation import remote
from hf_sl2o.subspace import QuantizedBasis
from hf_sl2o.subspace.thin import Factors
from hf_sl2o.subspace.tucker import TuckerBasis

from .conftest import random_dense
from .hub_client import api, counted, use
from .loopback_hub import loopback_hub

pytestmark = pytest.mark.hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with loopback_hub() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture
def rule():
    return LSTMRule(RuleConfig(hidden_size=4))


def dense(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(40, 12), torch.nn.Linear(12, 6, bias=False))
    return random_dense(layers.named_parameters(), dim=5)


def bases():
    basis = dense()
    yield basis
    yield basis.to(dtype=torch.bfloat16)
    yield QuantizedBasis.from_dense(basis)
    yield QuantizedBasis.from_dense(basis, bits=4)
    yield RandomBasis(basis.layout, 5, seed=9)
    left, right = (torch.linalg.qr(torch.randn(size, 3))[0] for size in (12, 40))
    factors = Factors(torch.randn(2, 3, 3), left=left, right=right)
    yield TuckerBasis(Layout(("w",), ((12, 40),)), [factors], torch.eye(2), torch.rand(2) + 1)


def same_bits(one, other):
    (config, tensors), (config_2, tensors_2) = one.to_files(), other.to_files()
    assert config == config_2 and tensors.keys() == tensors_2.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == tensors_2[name].dtype and torch.equal(tensor, tensors_2[name])


# Round trips


@pytest.mark.parametrize("lfs", [False, True])
def test_rules_and_bases_come_back_to_the_bit(hub, rule, lfs):
    hub.lfs = lfs
    for number, made in enumerate([rule, *bases()]):
        made.push_to_hub(f"user/it-{number}")
        kind = Rule if number == 0 else Basis
        same_bits(kind.from_pretrained(f"user/it-{number}"), made)
        files = hub.repos[f"user/it-{number}"].at("main")[1]
        assert set(files) == {"README.md", "config.json", "model.safetensors"}
        assert f'"user/it-{number}"' in files["README.md"].decode() or "rule=user/it-0" in files["README.md"].decode()
    assert len(hub.large) == (7 if lfs else 0)


def test_a_changed_bit_is_found(hub, rule, tmp_path):
    rule.save_pretrained(tmp_path / "rule")
    config, weights = ((tmp_path / "rule" / name).read_bytes() for name in ("config.json", "model.safetensors"))
    changed = bytearray(weights)
    changed[-1] ^= 1
    hub.put("user/tampered", config__json=config, model__safetensors=bytes(changed))
    hub.put("user/truncated", config__json=config, model__safetensors=weights[:-20])
    for name in ("tampered", "truncated"):
        with pytest.raises(ValueError, match="sha256"):
            Rule.from_pretrained(f"user/{name}")


def test_a_folder_of_several(hub, rule, tmp_path):
    basis = dense()
    rule.save_pretrained(tmp_path / "both" / "rule")
    basis.save_pretrained(tmp_path / "both" / "basis")
    api(hub).create_repo("user/both")
    api(hub).upload_folder(repo_id="user/both", folder_path=tmp_path / "both")
    same_bits(Rule.from_pretrained("user/both", subfolder="rule"), rule)
    same_bits(Basis.from_pretrained("user/both", subfolder="basis"), basis)
    whole = snapshot_download("user/both", cache_dir=tmp_path / "other")
    same_bits(Rule.from_pretrained(whole, subfolder="rule"), rule)
    for climbing in ("../rule", "rule/../..", "/etc", "..\\rule", "C:rule"):
        for place in (whole, "user/both"):
            with pytest.raises(ValueError, match="expected a folder inside"):
                Rule.from_pretrained(place, subfolder=climbing)


def test_nothing_but_two_files_is_asked_for(hub, rule):
    rule.push_to_hub("user/rule")
    hub.put("user/rule", evil__py=b"raise SystemExit(3)", model__pkl=b"cos\nsystem\n(S'false'\ntR.")
    with counted(hub) as requests:
        Rule.from_pretrained("user/rule")
    assert {line.rpartition("/")[2] for line in requests} == {"config.json", "model.safetensors"}


# Revisions


def test_branches_tags_commits_and_pull_requests(hub, rule):
    older, newer = LSTMRule(RuleConfig(hidden_size=4)), LSTMRule(RuleConfig(hidden_size=4))
    first = older.push_to_hub("user/rule").rpartition("/")[2]
    api(hub).create_tag("user/rule", tag="v1")
    newer.push_to_hub("user/rule")
    rule.push_to_hub("user/rule", branch="try/wide")
    proposed = LSTMRule(RuleConfig(hidden_size=4))
    proposed.push_to_hub("user/rule", create_pr=True)
    expected = {"main": newer, "v1": older, first: older, "try/wide": rule, "refs/pr/1": proposed}
    for revision, made in expected.items():
        same_bits(Rule.from_pretrained("user/rule", revision=revision), made)
    assert len({made.fingerprint for made in expected.values()}) == 4
    refs = api(hub).list_repo_refs("user/rule")
    assert [branch.name for branch in refs.branches] == ["main", "try/wide"] and refs.tags[0].target_commit == first
    with pytest.raises(FileNotFoundError, match=r"revision v2\).*has no revision 'v2'; check the name \(404\)"):
        Rule.from_pretrained("user/rule", revision="v2")


def test_an_unchanged_push_makes_no_commit(hub, rule):
    rule.push_to_hub("user/rule")
    commits = len(hub.repos["user/rule"])
    rule.push_to_hub("user/rule")
    assert len(hub.repos["user/rule"]) == commits
    LSTMRule(RuleConfig(hidden_size=4)).push_to_hub("user/rule")
    assert len(hub.repos["user/rule"]) == commits + 1


def test_all_files_are_of_one_commit(hub, rule, monkeypatch):
    """A push between config.json and the weights: what was begun is loaded, not half of each."""
    rule.push_to_hub("user/rule")
    newer = LSTMRule(RuleConfig(hidden_size=6))
    download = remote.hf_hub_download

    def and_push(repo, name, **options):
        path = download(repo, name, **options)
        if name == "config.json" and len(hub.repos["user/rule"]) == 2:
            newer.push_to_hub("user/rule")
        return path

    monkeypatch.setattr(remote, "hf_hub_download", and_push)
    same_bits(Rule.from_pretrained("user/rule"), rule)
    same_bits(Rule.from_pretrained("user/rule"), newer)


def test_a_branch_that_went_back_is_seen_and_kept(hub, rule):
    first = rule.push_to_hub("user/rule").rpartition("/")[2]
    newer = LSTMRule(RuleConfig(hidden_size=4))
    newer.push_to_hub("user/rule")
    for made in (newer, rule):
        same_bits(Rule.from_pretrained("user/rule"), made)
        same_bits(Rule.from_pretrained("user/rule", local_files_only=True), made)
        hub.repos["user/rule"].branches["main"] = first


# The cache


def test_requests_of_a_load(hub, rule):
    commit = rule.push_to_hub("user/rule").rpartition("/")[2]
    with counted(hub) as first:
        Rule.from_pretrained("user/rule")
    with counted(hub) as warm:
        Rule.from_pretrained("user/rule")
    with counted(hub) as pinned:
        Rule.from_pretrained("user/rule", revision=commit)
        Rule.from_pretrained("user/rule", local_files_only=True)
    with counted(hub) as forced:
        Rule.from_pretrained("user/rule", force_download=True)
    config, weights = (f"/user/rule/resolve/main/{name}" for name in ("config.json", "model.safetensors"))
    assert first[:3] == [f"HEAD {config}", f"HEAD {config}", f"GET {config}"] and len(first) == 5
    assert warm == [f"HEAD {config}"] and pinned == []
    assert [line.split()[0] for line in forced].count("GET") == 2
    assert weights not in " ".join(first)  # by its commit


def test_a_load_from_a_warm_cache_takes_milliseconds(hub):
    """At most 10 ms on an idle machine; the smallest of many, as this one may be busy. The Hub's own answer adds."""
    commit = LSTMRule().push_to_hub("user/rule").rpartition("/")[2]
    for where in ({}, {"revision": commit}, {"local_files_only": True}):
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            Rule.from_pretrained("user/rule", **where)
            times.append(time.perf_counter() - begin)
        assert min(times) < 0.010, where


def test_without_a_network_the_cache_is_used_and_said_once(hub, rule, monkeypatch, caplog):
    rule.push_to_hub("user/rule")
    Rule.from_pretrained("user/rule")
    assert not caplog.records
    hub.stop()
    with caplog.at_level(logging.WARNING):
        same_bits(Rule.from_pretrained("user/rule"), rule)
    assert len(caplog.records) == 1
    assert "user/rule (revision main) is taken from the cache" in caplog.text and "could not be reached" in caplog.text
    caplog.clear()
    same_bits(Rule.from_pretrained("user/rule", local_files_only=True), rule)
    assert not caplog.records  # asked for
    with pytest.raises(
        FileNotFoundError, match="could not be reached, or hung up .ConnectError.*try again with a net"
    ):
        Rule.from_pretrained("user/other")
    with pytest.raises(FileNotFoundError, match="could not be reached"):
        Rule.from_pretrained("user/rule", force_download=True)
    with pytest.raises(FileNotFoundError, match="nothing may be downloaded .local_files_only."):
        Rule.from_pretrained("user/other", local_files_only=True)
    with pytest.raises(ConnectionError, match="could not push to 'user/rule': the Hub could not be reached"):
        rule.push_to_hub("user/rule")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same_bits(Rule.from_pretrained("user/rule"), rule)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set, and the cache does not have it"):
        Rule.from_pretrained("user/other")


def test_half_a_cache_without_a_network(hub, rule, tmp_path):
    rule.push_to_hub("user/rule")
    Rule.from_pretrained("user/rule")
    for path in (tmp_path / "cache").rglob("model.safetensors"):
        path.unlink()
    hub.stop()
    with pytest.raises(
        FileNotFoundError, match="model.safetensors .*the cache has only a part, and the Hub could not"
    ):
        Rule.from_pretrained("user/rule")


def test_a_hub_in_trouble(hub, rule, caplog, monkeypatch, tmp_path):
    rule.push_to_hub("user/rule")
    Rule.from_pretrained("user/rule")
    hub.down = 503
    same_bits(Rule.from_pretrained("user/rule"), rule)
    assert "the Hub has trouble (503)" in caplog.text
    with pytest.raises(ConnectionError, match=r"trouble \(503\); try again later; no file there was changed"):
        rule.push_to_hub("user/rule")
    waiting = SimpleNamespace(sleep=lambda seconds: setattr(hub, "down", None))
    monkeypatch.setattr("huggingface_hub.utils._http.time", waiting)
    with pytest.raises(FileNotFoundError, match=r"trouble \(503\); try again later"):
        Rule.from_pretrained("user/rule", force_download=True)
    same_bits(Rule.from_pretrained("user/rule", cache_dir=tmp_path / "fresh"), rule)  # the client tried again
    with pytest.raises(ValueError, match="at the same time"):
        Rule.from_pretrained("user/rule", force_download=True, local_files_only=True)


def test_a_hub_that_does_not_answer(hub, rule, monkeypatch):
    rule.push_to_hub("user/rule")
    hub.delay = 0.05
    same_bits(Rule.from_pretrained("user/rule"), rule)
    monkeypatch.setattr(remote, "_TIMEOUT", 0.02)
    same_bits(Rule.from_pretrained("user/rule"), rule)  # from the cache
    with pytest.raises(FileNotFoundError, match="could not be reached, or hung up .ReadTimeout"):
        Rule.from_pretrained("user/rule", force_download=True)


@pytest.mark.parametrize("lfs", [False, True])
def test_an_interrupted_download_goes_on(hub, rule, lfs):
    hub.lfs = lfs
    rule.push_to_hub("user/rule")
    hub.cuts["model.safetensors"] = [700, 300]
    with counted(hub) as requests:
        same_bits(Rule.from_pretrained("user/rule"), rule)
    assert hub.cuts["model.safetensors"] == []
    assert sum(line.startswith("GET") and line.endswith("model.safetensors") for line in requests) == 3


def test_a_download_that_never_ends_leaves_nothing(hub, rule, tmp_path):
    rule.push_to_hub("user/rule")
    hub.cuts["model.safetensors"] = [700] + [0] * 20
    with pytest.raises(
        FileNotFoundError, match="model.safetensors .*could not be had: the Hub could not be reached, or hung"
    ):
        Rule.from_pretrained("user/rule")
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [name for name in left if "incomplete" in name or name == "model.safetensors"]
    hub.cuts.clear()
    same_bits(Rule.from_pretrained("user/rule"), rule)


# The server itself


def test_commits_are_whole_or_not_there(hub):
    there = api(hub)
    there.create_repo("user/files")
    one = there.upload_file(repo_id="user/files", path_or_fileobj=b"1", path_in_repo="a/one.txt").oid
    there.upload_file(repo_id="user/files", path_or_fileobj=b"2", path_in_repo="a/b/two.txt", parent_commit=one)
    with pytest.raises(Exception, match="412"):
        there.upload_file(repo_id="user/files", path_or_fileobj=b"3", path_in_repo="three.txt", parent_commit=one)
    names = [entry.path for entry in there.list_repo_tree("user/files", recursive=True)]
    assert names == ["a", "a/b", "a/b/two.txt", "a/one.txt"]
    assert [entry.path for entry in there.list_repo_tree("user/files", "a")] == ["a/b", "a/one.txt"]
    there.delete_folder("a/b", "user/files")
    there.delete_file("a/one.txt", "user/files")
    assert hub.repos["user/files"].at("main")[1] == {}
    with pytest.raises(Exception, match="doesn't exist"):
        there.delete_file("a/one.txt", "user/files")
    there.create_repo("user/rows", repo_type="dataset")
    there.upload_file(repo_id="user/rows", path_or_fileobj=b"1", path_in_repo="rows.txt", repo_type="dataset")
    there.create_branch("user/rows", branch="more", repo_type="dataset")
    there.delete_branch("user/rows", branch="more", repo_type="dataset")
    path = there.hf_hub_download("user/rows", "rows.txt", repo_type="dataset")
    assert open(path, "rb").read() == b"1" and list(hub.repos) == ["user/files", "datasets/user/rows"]
    assert there.whoami()["name"] == "user"
