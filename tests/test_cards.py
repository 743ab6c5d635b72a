"""Model cards: whose they are, their metadata by the client's own checks, and their numbers from results alone."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from hf_sl2o import LSTMRule, Rule, RuleConfig
from hf_sl2o.experiments.cards import card_from_comparison, card_from_provenance
from hf_sl2o.experiments.table import table
from hf_sl2o.foundation.cards import METADATA, is_ours, read_card
from hf_sl2o.rules import SHIPPED_RULES

from .conftest import random_dense
from .hub_client import api, use
from .loopback_hub import loopback_hub

RESULTS = Path(__file__).parents[1] / "recipes" / "results"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with loopback_hub() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture
def rule():
    return LSTMRule(RuleConfig(hidden_size=4))


def card_of(hub, name):
    return hub.repos[name].at("main")[1]["README.md"].decode()


# What it says


def test_a_card_says_how_to_load_and_what_for(rule, tmp_path):
    rule.save_pretrained(
        tmp_path, repo_id="user/mine", model_card_kwargs={"license": "apache-2.0", "training": "Runs."}
    )
    card = read_card(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "hf_sl2o" and "sl2o" in card.data.tags
    for text in ("rule=user/mine", "## What it was made from\n\nRuns.", "## Limits", "## Licence\n\napache-2.0"):
        assert text in card.text
    assert "{{" not in card.text and "None" not in card.text
    basis = random_dense([("w", torch.nn.Parameter(torch.zeros(5, 6)))], dim=3)
    basis.save_pretrained(tmp_path / "basis")
    card = read_card(tmp_path / "basis" / "README.md")
    assert "A 3-dimensional subspace" in card.text and "Licence" not in card.text and card.data.license is None


def test_an_unknown_entry_is_named_before_anything_is_written(rule, tmp_path):
    with pytest.raises(TypeError, match="model_card_kwargs has 'licence', expected texts"):
        rule.save_pretrained(tmp_path / "rule", model_card_kwargs={"licence": "mit"})
    (tmp_path / "not.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="not.png is no PNG image"):
        rule.save_pretrained(tmp_path / "rule", model_card_kwargs={"figure": tmp_path / "not.png"})
    assert not (tmp_path / "rule").exists()
    assert {"license", "datasets", "eval_results", "base_model"} <= set(METADATA)


def test_tags_are_added_and_results_are_checked(rule, tmp_path):
    result = EvalResult("other", "rows", "rows", "loss", 0.25)
    rule.save_pretrained(tmp_path, model_card_kwargs={"tags": ["mine"], "eval_results": [result]})
    data = read_card(tmp_path / "README.md").data
    assert data.eval_results == [result] and {"mine", "learned-optimizer"} <= set(data.tags)
    with pytest.raises(ValueError, match="eval_results"):
        rule.save_pretrained(tmp_path, model_card_kwargs={"eval_results": [0.25]})


# From a comparison


@pytest.mark.parametrize(("name", "arm"), [("gpt2_e2e", "sl2o"), ("resnet20_cifar", "sl2o_default")])
def test_a_card_from_a_comparison_has_its_numbers(hub, rule, tmp_path, name, arm):
    path = RESULTS / f"{name}.json"
    comparison = json.loads(path.read_text())
    kwargs = card_from_comparison(path, arm, dataset="user/rows")
    rule.save_pretrained(tmp_path, model_card_kwargs={**kwargs, "license": "apache-2.0"})
    card = ModelCard.load(tmp_path / "README.md")
    card.validate()
    run = comparison["runs"][arm]
    found = {(result.metric_type, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert found["loss", "Validation loss, mean of 3 seeds"] == run["final_eval_loss"]
    steps = [value for (kind, _), value in found.items() if kind == "steps"]
    assert steps == [level["steps"][arm] for level in comparison["steps_to"].values()]
    if tests := run.get("test_accuracy_per_seed"):
        assert found["accuracy", "Test accuracy, mean of 3 seeds"] == sum(tests) / len(tests)
    assert table(comparison) in card.text and f"{comparison['amortised']['total']:,} training steps" in card.text
    figure = path.with_suffix(".png")
    assert figure.is_file() == (tmp_path / "comparison.png").is_file() == ("(comparison.png)" in card.text)
    if figure.is_file():
        assert (tmp_path / "comparison.png").read_bytes() == figure.read_bytes()
    trained_here = arm == "sl2o"
    assert ("Meta-trained on" in card.text) == trained_here == (card.data.datasets == ["user/rows"])
    assert trained_here or "80,400 training steps" in card.text


def test_other_numbers_make_another_card(tmp_path):
    comparison = json.loads((RESULTS / "gpt2_e2e.json").read_text())
    comparison["runs"]["sl2o"]["final_eval_loss"] = 1.25
    comparison["runs"]["adamw"]["final_eval_loss"] = float("inf")
    comparison["steps_to"]["adamw_whitened_final"]["steps"]["sl2o"] = None
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    kwargs = card_from_comparison(tmp_path / "comparison.json")
    assert [result.metric_value for result in kwargs["eval_results"]] == [1.25, 23.333333333333332]
    assert "1.250" in kwargs["evaluation"] and "figure" not in kwargs
    comparison["runs"]["sl2o"]["final_eval_loss"] = float("nan")
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    assert len(card_from_comparison(tmp_path / "comparison.json")["eval_results"]) == 1


def test_results_of_another_rule_are_refused(rule, tmp_path):
    comparison = json.loads((RESULTS / "gpt2_e2e.json").read_text())
    comparison["runs"]["sl2o"]["rule"] = rule.fingerprint
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    kwargs = card_from_comparison(tmp_path / "comparison.json")
    rule.save_pretrained(tmp_path / "own", model_card_kwargs=kwargs)
    another = Rule.from_pretrained(SHIPPED_RULES / "default")
    words = f"fingerprint '{rule.fingerprint}', and this LSTMRule has {another.fingerprint}"
    with pytest.raises(ValueError, match=words):
        another.save_pretrained(tmp_path / "another", model_card_kwargs=kwargs)
    assert not (tmp_path / "another").exists()


def test_what_is_no_comparison_or_no_rule_is_refused(tmp_path):
    path = RESULTS / "gpt2_e2e.json"
    for arm in ("adamw", "symbolic", "absent"):
        with pytest.raises(ValueError, match=f"arm is '{arm}', expected one of .*learned rule: sl2o"):
            card_from_comparison(path, arm)
    with pytest.raises(ValueError, match="rule_default.json lacks .*give the comparison.json"):
        card_from_comparison(RESULTS / "rule_default.json")
    with pytest.raises(FileNotFoundError):
        card_from_comparison(tmp_path / "comparison.json")


@pytest.mark.parametrize("name", ["default", "default-lora", "paper-cnn", "paper-transformer"])
def test_the_rules_that_ship_say_what_they_were_trained_on(name, tmp_path):
    folder = SHIPPED_RULES / name
    provenance = json.loads((folder / "provenance.json").read_text())
    Rule.from_pretrained(folder).save_pretrained(tmp_path, model_card_kwargs=card_from_provenance(folder))
    card = read_card(tmp_path / "README.md")
    assert provenance["command"] in card.text and all(task in card.text for task in provenance["tasks"])
    (tmp_path / "provenance.json").write_text('{"tasks": []}')
    with pytest.raises(ValueError, match="provenance.json lacks 'command'"):
        card_from_provenance(tmp_path)


# On the Hub


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("license: [mit", "metadata of .*README.md cannot be read"),
        ("- a list", "cannot be read .repo card metadata block should be a dict"),
        ("model-index:\n- name: x", "cannot be read .Invalid `model_index`"),
        ("license: {a: b}", 'the Hub refuses the metadata of README.md: "license" must be a string; nothing was sent'),
    ],
)
def test_broken_metadata_are_said_before_anything_is_sent(hub, rule, tmp_path, metadata, words):
    rule.save_pretrained(tmp_path / "rule")
    (tmp_path / "rule" / "README.md").write_text(f"---\n{metadata}\n---\n\n# Mine\n")
    hub.log.clear()
    with pytest.raises(ValueError, match=words):
        rule.save_pretrained(tmp_path / "rule", repo_id="user/rule", push_to_hub=True)
    assert not hub.repos and set(hub.log) <= {"POST /api/validate-yaml"}
    (tmp_path / "rule" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    rule.save_pretrained(tmp_path / "rule", repo_id="user/rule", push_to_hub=True)
    assert card_of(hub, "user/rule") == "---\nlicense: mit\n---\n\n# Mine\n"


def test_a_card_that_somebody_changed_on_the_hub_stays(hub, rule, tmp_path):
    rule.push_to_hub("user/rule")
    made = card_of(hub, "user/rule")
    rule.push_to_hub("user/rule", model_card_kwargs={"limits": "Few."})
    assert "Few." in card_of(hub, "user/rule") and "Few." not in made  # it was ours
    mine = "---\nlicense: mit\n---\n# Mine\n"
    api(hub).upload_file(repo_id="user/rule", path_or_fileobj=mine.encode(), path_in_repo="README.md")
    other = LSTMRule(RuleConfig(hidden_size=6))
    other.push_to_hub("user/rule")
    assert card_of(hub, "user/rule") == mine
    assert json.loads(hub.repos["user/rule"].at("main")[1]["config.json"])["rule"]["hidden_size"] == 6


def test_a_figure_goes_with_the_card(hub, rule, tmp_path):
    image = b"\x89PNG\r\n\x1a\n" + b"pixels"
    (tmp_path / "losses.png").write_bytes(image)
    kwargs = {"evaluation": "See.", "figure": tmp_path / "losses.png"}
    rule.push_to_hub("user/one", model_card_kwargs=kwargs)
    rule.save_pretrained(tmp_path / "rule", repo_id="user/two", push_to_hub=True, model_card_kwargs=kwargs)
    for name in ("user/one", "user/two"):
        assert hub.repos[name].at("main")[1]["comparison.png"] == image and "(comparison.png)" in card_of(hub, name)
    assert is_ours(tmp_path / "rule" / "README.md")
