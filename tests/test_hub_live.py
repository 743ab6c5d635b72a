"""One round trip with the true Hub, where the environment has a token that may write; it removes what it made."""

import os
import uuid

import pytest
from huggingface_hub import HfApi

from hf_sl2o import LSTMRule, Rule, RuleConfig
from hf_sl2o.foundation.cards import is_ours

TOKEN = os.environ.get("HF_TOKEN")

pytestmark = [
    pytest.mark.hub_live,
    pytest.mark.skipif(not TOKEN, reason="HF_TOKEN is not set: there is no account on the Hub to write to"),
]


@pytest.fixture
def repo():
    """The name of a private repository that there is not."""
    api = HfApi(token=TOKEN)
    name = f"{api.whoami()['name']}/hf-sl2o-test-{uuid.uuid4().hex[:12]}"
    try:
        yield name
    finally:
        api.delete_repo(name, missing_ok=True)


def test_push_and_pull(repo, tmp_path):
    older, newer = LSTMRule(RuleConfig(hidden_size=4)), LSTMRule(RuleConfig(hidden_size=4))
    commit = older.push_to_hub(repo, private=True, token=TOKEN).rpartition("/")[2]
    newer.push_to_hub(repo, branch="next", token=TOKEN)
    where = {"token": TOKEN, "cache_dir": tmp_path / "cache"}
    assert Rule.from_pretrained(repo, **where).fingerprint == older.fingerprint
    assert Rule.from_pretrained(repo, revision="next", **where).fingerprint == newer.fingerprint
    assert Rule.from_pretrained(repo, revision=commit, local_files_only=True, **where).fingerprint == older.fingerprint
    api = HfApi(token=TOKEN)
    assert api.repo_info(repo).private
    assert is_ours(tmp_path / api.hf_hub_download(repo, "README.md", cache_dir=tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="private and no token was sent|no such repository"):
        Rule.from_pretrained(repo, token=False, cache_dir=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="does not know the token|may not see it"):
        Rule.from_pretrained(repo, token="hf_" + "x" * 34, cache_dir=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="has no revision 'absent'"):
        Rule.from_pretrained(repo, revision="absent", **where)
    api.upload_file(repo_id=repo, path_or_fileobj=b"---\nlicense: mit\n---\n# Mine\n", path_in_repo="README.md")
    newer.push_to_hub(repo, token=TOKEN)
    assert b"# Mine" in open(api.hf_hub_download(repo, "README.md", cache_dir=tmp_path / "new"), "rb").read()
