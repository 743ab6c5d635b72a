"""recipes/gpt2_e2e.py --stage generate: sentences of every run, their scores in the comparison, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_sl2o.experiments import generation
from hf_sl2o.experiments.data.e2e import load_rows
from hf_sl2o.metrics import bleu, e2e_scores
from recipes import gpt2_e2e

SMALL = """--train_rows 400 --eval_rows 16 --trajectory_steps 30 --snapshots 15 --dim 4 --rule default
--trajectory_learning_rates 0.01 --max_steps 6 --eval_steps 6 --logging_steps 6 --save_steps 6 --quick_grid
--per_device_train_batch_size 8 --use_cpu --seeds 2 --arms sl2o adamw""".split()
GENERATE = ["--stage", "generate", "--generate_rows", "3"]
NAME = "validation-first-3"


def recipe(folder, *flags):
    return gpt2_e2e.main([*SMALL, "--output_dir", str(folder), *flags])


def read(folder):
    return json.loads((folder / "comparison.json").read_text())


def without_java(monkeypatch):
    for module in (generation, generation.e2e_scores.__globals__):
        set_to = monkeypatch.setitem if isinstance(module, dict) else monkeypatch.setattr
        set_to(module, "missing", lambda: "there is no command java")
    monkeypatch.setattr(generation, "default_tokenizer", lambda: "ptb-python")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    recipe(folder)
    return folder


@pytest.fixture(scope="module")
def generated(compared, tmp_path_factory):
    folder = shutil.copytree(compared, tmp_path_factory.mktemp("generated") / "out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_java(monkeypatch)
        recipe(folder, *GENERATE)
    return folder


def test_scores_are_added_and_nothing_is_lost(compared, generated):
    made = read(generated)
    found = made.pop("generation")[NAME]
    assert made == read(compared)
    assert found["decoding"] == {
        "num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "max_new_tokens": 64,
    }  # fmt: skip
    groups = generation.by_meaning(load_rows("embedded", "validation"), 3)
    assert found["meanings"] == 3 and found["references"] == sum(map(len, groups.values())) > 3
    assert set(found["runs"]) == {"sl2o", "adamw"}
    for arm, entries in found["runs"].items():
        assert [entry["seed"] for entry in entries] == made["runs"][arm]["seeds"]
        for entry in entries:
            kept = json.loads((generated / "generated" / NAME / f"{arm}-seed-{entry['seed']}.json").read_text())
            expected = e2e_scores(
                kept["sentences"], list(groups.values()), tokenizer="ptb-python",
                only=["bleu", "nist", "rouge_l", "cider"],
            )  # fmt: skip
            assert {name: entry[name] for name in expected} == expected and entry["meteor"] is None
    assert len({entry["rouge_l"] for entries in found["runs"].values() for entry in entries}) == 4  # a run each


def test_sentences_are_those_of_the_weights_at_the_end(generated):
    """By `generate` on one meaning at a time, from the checkpoint that a user sees, without padding."""
    folder = generated / "adamw" / "checkpoint-30"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    kept = json.loads((generated / "generated" / NAME / "adamw-seed-42.json").read_text())["sentences"]
    meanings = list(generation.by_meaning(load_rows("embedded", "validation"), 3))
    found, plain = [], []
    for meaning in meanings:
        ids = torch.tensor([tokenizer(f"{meaning} ||", add_special_tokens=False)["input_ids"]])
        settings = {"num_beams": 10, "length_penalty": 0.8, "do_sample": False, "max_new_tokens": 64}
        settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.eos_token_id}
        rule = generation.NoRepeatInAnswer(ids.shape[1], 4)
        for where, further in ((found, {"logits_processor": [rule]}), (plain, {"num_beams": 1})):
            out = model.generate(ids, **{**settings, **further})[0, ids.shape[1] :]
            where.append(" ".join(tokenizer.decode(out, skip_special_tokens=True).split()))
    assert kept == found and kept != plain


def test_the_second_time_nothing_is_decoded_again(generated, monkeypatch, capsys):
    before = read(generated)
    without_java(monkeypatch)
    monkeypatch.setattr(generation, "with_weights", lambda *args: pytest.fail("decoded again"))
    recipe(generated, *GENERATE)
    assert read(generated) == before
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 and "+-" in rows[1] and "ptb-python" in rows[1] and "METEOR is left out" in out
    with pytest.raises(BaseException, match="decoded again"):
        recipe(generated, "--stage", "generate", "--generate_rows", "2")


def test_killed_between_runs_it_goes_on(compared, tmp_path, monkeypatch):
    folder, decoded = shutil.copytree(compared, tmp_path / "out"), []
    without_java(monkeypatch)

    def dies(model, tokenizer, meanings, title, **kwargs):
        decoded.append(title)
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return [f"It is a place of {title}."] * len(meanings)

    monkeypatch.setattr(generation, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        recipe(folder, *GENERATE)
    assert read(folder) == read(compared)
    recipe(folder, *GENERATE)
    assert len(decoded) == 5 and decoded[3] == decoded[2]  # the two that were done are not decoded again
    assert {arm: len(entries) for arm, entries in read(folder)["generation"][NAME]["runs"].items()} == {
        "sl2o": 2, "adamw": 2,
    }  # fmt: skip
    kept = [path.read_text() for path in (folder / "generated" / NAME).glob("*-seed-??.json")]
    assert all(sum(title in text for text in kept) == 1 for title in set(decoded))


def test_a_comparison_that_is_written_again_keeps_the_scores_of_the_same_runs(generated, tmp_path):
    folder = shutil.copytree(generated, tmp_path / "out")
    recipe(folder)
    assert read(folder)["generation"] == read(generated)["generation"]
    recipe(folder, "--sl2o_average", "0")  # other runs in the subspace; those of all weights stay
    assert set(read(folder)["generation"][NAME]["runs"]) == {"adamw"}


def test_some_arms_and_another_split_are_added_to_the_others(generated, tmp_path, monkeypatch):
    folder = shutil.copytree(generated, tmp_path / "out")
    without_java(monkeypatch)
    at = SMALL.index("--arms")
    words = [*SMALL[:at], "--arms", "sl2o", "--output_dir", str(folder), *GENERATE]
    gpt2_e2e.main(words)
    assert read(folder) == read(generated)
    monkeypatch.setattr(generation, "decode", lambda model, tokenizer, meanings, **kwargs: ["A pub."] * len(meanings))
    gpt2_e2e.main([*words[:-1], "2", "--generate_split", "test"])
    both = read(folder)["generation"]
    assert set(both) == {NAME, "test-first-2"} and set(both["test-first-2"]["runs"]) == {"sl2o"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dim", "5"), "--dim is 5, and the comparison in .* was made with 4"),
        (("--seed", "1"), "--seed is 1, and the comparison"),
        (("--arms", "random"), "--arms has 'random', and the comparison has adamw, sl2o|sl2o, adamw"),
        (("--stage", "generation"), "--stage is 'generation', expected compare or generate"),
        (("--generate_split", "train"), "--generate_split is 'train', expected validation or test"),
        (("--generate_rows", "0"), "--generate_rows is 0, expected"),
    ],
)
def test_what_does_not_fit_is_said(compared, flags, message):
    with pytest.raises(ValueError, match=message):
        recipe(compared, *GENERATE, *flags)


def test_what_is_gone_is_said_before_anything_is_decoded(compared, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run the comparison first: the same command without --stage generate"):
        recipe(tmp_path / "nothing", *GENERATE)
    monkeypatch.setattr(generation, "decode", lambda *args, **kwargs: pytest.fail("decoded"))
    folder = shutil.copytree(compared, tmp_path / "out")
    (first,) = (folder / "adamw" / "runs").glob("*seed-0/checkpoint-30")
    weights = load_file(first / "model.safetensors")
    save_file({name: 0.7 * w for name, w in weights.items()}, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="they are not those of this run"):
        recipe(folder, *GENERATE, "--arms", "adamw")
    (last,) = (folder / "adamw" / "runs").glob("*seed-1/checkpoint-30")
    shutil.rmtree(last)
    with pytest.raises(ValueError, match="no checkpoint of its last step, 30, .* --save_strategy steps"):
        recipe(folder, *GENERATE)
    (last.parent / "run.json").unlink()
    with pytest.raises(ValueError, match="is not the run that comparison.json lists"):
        recipe(folder, *GENERATE)


def test_a_run_that_diverged_has_no_scores(generated, tmp_path, monkeypatch):
    folder = shutil.copytree(generated, tmp_path / "out")
    without_java(monkeypatch)
    made = read(folder)
    run = made["runs"]["sl2o"]
    path = next((folder / "sl2o" / "runs").glob(f"{run['units']}-{run['learning_rate']:g}-seed-1")) / "run.json"
    known = generation.kept(path)
    known["eval"][-1][1] = run["eval_per_seed"][1][-1][1] = float("nan")
    generation.keep(path, known)
    (folder / "comparison.json").write_text(json.dumps(made))
    recipe(folder, *GENERATE)
    entries = read(folder)["generation"][NAME]["runs"]["sl2o"]
    assert "bleu" in entries[0] and entries[1]["diverged"] and "bleu" not in entries[1]
    assert "| diverged |" in " ".join(generation.scores_table(read(folder)["generation"][NAME]["runs"]).split())


def test_names_of_the_prompt_may_be_repeated_once():
    """`no_repeat_ngram_size` of transformers forbids them; the rule here forbids the second time in the answer."""
    prompt = torch.tensor([[1, 2, 3, 4, 9, 1, 2, 3]])
    twice = torch.tensor([[1, 2, 3, 4, 9, 1, 2, 3, 4, 1, 2, 3]])
    scores = torch.zeros(1, 10)
    ours = generation.NoRepeatInAnswer(5, 4)
    assert ours(prompt, scores)[0, 4] == 0 and ours(twice, scores)[0, 4] == -torch.inf
    theirs = generation.NoRepeatNGramLogitsProcessor(4)
    assert theirs(prompt, scores)[0, 4] == -torch.inf


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decoding_is_the_same_in_any_batch(compared, batch_size):
    folder = next((compared / "adamw").glob("checkpoint-*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    meanings = list(generation.by_meaning(load_rows("embedded", "validation"), 4))
    assert generation.decode(model, tokenizer, meanings, batch_size=batch_size) == generation.decode(
        model, tokenizer, meanings, batch_size=4
    )
    with pytest.raises(ValueError, match="tokens, and the model takes 128 with the sentence"):
        generation.decode(model, tokenizer, [meanings[0] * 20])


@pytest.fixture
def little_room(monkeypatch):
    """Four meanings, of which the longest leaves room for three tokens; and the model, untrained."""
    monkeypatch.setitem(generation.DECODING, "max_new_tokens", 9)
    tokenizer = gpt2_e2e.train_tokenizer(load_rows("embedded", "train", 200), 400)
    meanings = list(generation.by_meaning(load_rows("embedded", "validation"), 4))
    end, longest = tokenizer.eos_token_id, max(len(tokenizer(f"{meaning} ||")["input_ids"]) for meaning in meanings)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=32, n_positions=longest + 3, bos_token_id=end,
        eos_token_id=end, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokenizer, meanings


def test_a_long_meaning_cuts_no_sentence_of_its_batch(little_room):
    model, tokenizer, meanings = little_room
    alone = [generation.decode(model, tokenizer, [meaning])[0] for meaning in meanings]
    assert generation.decode(model, tokenizer, meanings) == alone
    sizes = [len(tokenizer(text)["input_ids"]) for text in alone]
    assert max(sizes) > min(sizes) + 3  # other rooms


def test_settings_that_a_model_brings_along_change_no_sentence(little_room):
    model, tokenizer, meanings = little_room
    before = generation.decode(model, tokenizer, meanings[:2])
    model.generation_config.update(repetition_penalty=9.0, min_new_tokens=9)
    assert generation.decode(model, tokenizer, meanings[:2]) == before


def test_meanings_are_grouped_wherever_they_stand():
    rows = [{"mr": "a", "ref": "1"}, {"mr": "b", "ref": "2"}, {"mr": "a", "ref": "3"}]
    assert generation.by_meaning(rows) == {"a": ["1", "3"], "b": ["2"]} and generation.by_meaning(rows, 1) == {
        "a": ["1", "3"]
    }


def test_adapters_are_loaded_into_the_base_they_were_trained_on(tmp_path, monkeypatch):
    without_java(monkeypatch)
    monkeypatch.setitem(generation.DECODING, "max_new_tokens", 4)
    flags = ["--subspace", "lora", "--arms", "sl2o", "--seeds", "1", "--rule", "default-lora"]
    recipe(tmp_path, *flags)
    made = recipe(tmp_path, *flags, *GENERATE)  # refuses weights of another loss
    assert made["generation"][NAME]["runs"]["sl2o"][0]["bleu"] >= 0


def test_a_model_that_copies_scores_what_it_should(tmp_path):
    """A network that knows three sentences by heart is decoded to them, so all scores are at their best."""
    rows = [{"mr": f"name[{name}]", "ref": f"{name} is a nice place to be."} for name in ("Ada", "Bo", "Cy")]
    tokenizer = gpt2_e2e.train_tokenizer(rows, 400)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=32, n_positions=64, bos_token_id=end, eos_token_id=end,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    batch = gpt2_e2e.collate(gpt2_e2e.E2EDataset(rows, tokenizer).examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    made = generation.decode(model, tokenizer, [row["mr"] for row in rows])
    assert made == [row["ref"] for row in rows]
    assert bleu(made, [[row["ref"]] for row in rows]) == 1.0
