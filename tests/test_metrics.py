"""BLEU, NIST, METEOR, ROUGE-L and CIDEr: the official scorer's numbers, definitions by brute force, bad input."""

import csv
import itertools
import math
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import evaluate
import pytest

from hf_sl2o import metrics
from hf_sl2o.experiments.data.e2e_embedded import generate
from hf_sl2o.metrics import java, scores
from hf_sl2o.metrics.captions import cider_of_words, longest_common, rouge_l_of_words
from hf_sl2o.metrics.ngrams import bleu_of_words, nist_of_words
from hf_sl2o.metrics.words import mteval_words, ptb_words

WITHOUT_JAVA = ["bleu", "nist", "rouge_l", "cider"]
needs_java = pytest.mark.skipif(
    java.missing() is not None, reason=f"the official tokenizer and METEOR need Java: {java.missing()}"
)
TRICKY = (
    [
        "The Eagle's food isn't family-friendly (from £20-25).",
        "Near Café Rouge: 3-star pub, cheap!",
        "It costs less than £20.50, 5 out of 5...",
        "'Aromi' cannot be found by St. John's College",
        "There is a pub.",
    ],
    [
        ["The Eagle does not serve family-friendly food (£20-25).",
         "The Eagle's food is from £20-25, and isn't child friendly"],
        ["Near Café Rouge is a cheap 3-star pub!"],
        ["It costs £20.50; 5 out of 5.", "Prices: less than £20.50 - 5 out of 5"],
        ["Aromi can't be found by St. John's College.", "'Aromi' cannot be found."],
        ["There's a pub; it is a pub."],
    ],
)  # fmt: skip
# Of the official scorer, github.com/tuetschek/e2e-metrics: `measure_scores.py -p`, on these very sentences.
OFFICIAL = {
    "embedded": {
        "bleu": 0.56918299, "nist": 6.59753551, "meteor": 0.42453792, "rouge_l": 0.61005786, "cider": 3.95788406,
    },
    "tricky": {
        "bleu": 0.53685662, "nist": 5.42606447, "meteor": 0.44978067, "rouge_l": 0.75755657, "cider": 4.82230280,
    },
    "released": {"bleu": 0.591790, "nist": 8.508351, "meteor": 0.435583, "rouge_l": 0.643077, "cider": 1.777996},
}  # fmt: skip


def held_out(rows):
    """The first reference of each meaning that has several stands for a system, every third without its last words."""
    groups = {}
    for row in rows:
        groups.setdefault(row["mr"], []).append(" ".join(row["ref"].split()))
    several = [of for of in groups.values() if len(of) > 1]
    cut = [" ".join(of[0].split()[: -2 if index % 3 == 0 else None]) for index, of in enumerate(several)]
    return cut, [of[1:] for of in several]


def sentences(name):
    if name == "tricky":
        return TRICKY
    if name == "embedded":
        return held_out(generate("validation", 120))
    folder = os.environ.get("HF_SL2O_DATA")
    if not folder:
        pytest.skip("needs the released E2E CSVs: HF_SL2O_DATA=FOLDER")
    with open(Path(folder) / "e2e_nlg" / "validation.csv", encoding="utf-8", newline="") as file:
        return held_out(csv.DictReader(file))


def words_of(name):
    predictions, references = sentences(name)
    return list(map(ptb_words, predictions)), [list(map(ptb_words, of)) for of in references]


@pytest.mark.parametrize("name", OFFICIAL)
def test_scores_are_those_of_the_official_scorer(name):
    found = metrics.e2e_scores(*sentences(name), tokenizer="ptb-python", only=WITHOUT_JAVA)
    assert found.pop("tokenizer") == "ptb-python"
    for score, value in found.items():
        assert value == pytest.approx(OFFICIAL[name][score], abs=2e-6), score
    predictions, references = sentences(name)
    moved = [*predictions[1:], predictions[0]]
    less = metrics.e2e_scores(moved, references, tokenizer="ptb-python", only=WITHOUT_JAVA)
    assert all(less[score] < value - 1e-5 for score, value in found.items())


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokenizer"), [("embedded", "ptb-java"), ("tricky", "ptb-python")])
def test_with_java_all_five_are_those_of_the_official_scorer(name, tokenizer, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")  # where Java would take another encoding
    monkeypatch.delenv("LANG", raising=False)
    before = {path: path.stat().st_mtime_ns for path in java._folder().rglob("*")}
    found = metrics.e2e_scores(*sentences(name), tokenizer=tokenizer)
    assert found.pop("tokenizer") == tokenizer and list(found) == list(metrics.scores.SCORES)
    assert found == pytest.approx(OFFICIAL[name], abs=1e-8)
    assert {path: path.stat().st_mtime_ns for path in java._folder().rglob("*")} == before


@needs_java
@pytest.mark.slow
def test_meteor_runs_where_numbers_have_a_comma(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de")
    words = ["it", "is", "a", "pub"]
    assert java.meteor_of_words([words], [[words]]) == 1.0
    monkeypatch.setattr(java, "_SETTINGS", [text for text in java._SETTINGS if "encoding" in text])
    with pytest.raises(RuntimeError, match="METEOR of pycocoevalcap gave no score: .*InputMismatchException"):
        java.meteor_of_words([words], [[words]])


@needs_java
def test_words_are_those_of_stanfords_program(monkeypatch):
    texts = [*TRICKY[0], *itertools.chain(*TRICKY[1]), *(row["ref"] for row in generate("train", 300)), "", "£ … ?"]
    assert java.stanford_words(texts) == [ptb_words(text) for text in texts]
    breaks = [f"one{sign}two" for sign in ("\n", "\x0b", "\x0c", "\u2028", "\u2029", "\r\n")]
    odd = [*breaks, "one\x85two", "one\xa0two"]
    assert java.stanford_words([*odd, "end"]) == [["one", "two"]] * len(odd) + [["end"]]
    # Left as they are, each of them begins a new line for the program, and moves all sentences after it.
    monkeypatch.setattr(java, "one_line", str)
    with pytest.raises(RuntimeError, match=f"gave {2 * len(breaks)} lines for {len(breaks)} sentences"):
        java.stanford_words(breaks)


@needs_java
@pytest.mark.slow
def test_of_the_released_sentences_two_have_other_words_in_python():
    """As the page says."""
    folder = os.environ.get("HF_SL2O_DATA")
    if not folder:
        pytest.skip("needs the released E2E CSVs: HF_SL2O_DATA=FOLDER")
    texts = set()
    for split in ("train", "validation", "test"):
        with open(Path(folder) / "e2e_nlg" / f"{split}.csv", encoding="utf-8", newline="") as file:
            texts |= {row["ref"] for row in csv.DictReader(file)}
    found = java.stanford_words(sorted(texts))
    differ = sum(words != ptb_words(text) for words, text in zip(found, sorted(texts), strict=True))
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"of {len(texts):,} sentences of E2E {('none', 'one', 'two')[differ]} differ" in page


def test_words_by_hand():
    assert ptb_words("It's £20-£25, they don't (really) care.") == [
        "it", "'s", "#", "20", "#", "25", "they", "do", "n't", "-lrb-", "really", "-rrb-", "care",
    ]  # fmt: skip
    assert ptb_words("Kid-friendly? Yes! 5 out of 5; \"good\".") == [
        "kid-friendly", "yes", "5", "out", "of", "5", "good",
    ]  # fmt: skip
    assert mteval_words("It's £20-25, \"5\" &amp; 1.5.") == [
        "it's", "£20", "-", "25", ",", '"', "5", '"', "&", "1.5", ".",
    ]  # fmt: skip


def test_bleu_is_sacrebleus_where_missing_references_are_none():
    sacrebleu = pytest.importorskip("sacrebleu", reason="the other BLEU is that of sacrebleu")
    predictions, references = sentences("embedded")
    most = max(map(len, references))

    def theirs(padding, lowercase=True):
        streams = [[of[place] if place < len(of) else padding for of in references] for place in range(most)]
        return sacrebleu.corpus_bleu(predictions, streams, lowercase=lowercase, smooth_method="none").score / 100

    ours = metrics.bleu(predictions, references)
    assert most > 1 and ours == pytest.approx(theirs(None), abs=1e-9)
    assert abs(ours - theirs(None, lowercase=False)) > 1e-3
    # The trap: of a sentence shorter than half of its reference an empty one is closer, and there is no penalty.
    predictions = ["The Mill is a pub.", "A pub."]
    references = [["The Mill is a pub in the city centre near Café Rouge, for adults only."], ["A pub.", "A cafe."]]
    ours, most = metrics.bleu(predictions, references), 2
    assert ours == pytest.approx(theirs(None), abs=1e-9) and theirs("") > 1.2 * ours
    padded = [[*of, *[None] * (most - len(of))] for of in references]
    assert metrics.bleu(predictions, padded) == ours


@pytest.mark.parametrize("name", ["embedded", "tricky"])
def test_rouge_l_and_cider_are_those_of_pycocoevalcap(name):
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason="the other ROUGE-L is that of pycocoevalcap")
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="the other CIDEr is that of pycocoevalcap")
    predictions, references = words_of(name)
    made = {row: [" ".join(words)] for row, words in enumerate(predictions)}
    given = {row: [" ".join(words) for words in of] for row, of in enumerate(references)}
    assert rouge_l_of_words(predictions, references) == pytest.approx(rouge.Rouge().compute_score(given, made)[0])
    theirs = cider.Cider().compute_score(given, made)[0]
    assert cider_of_words(predictions, references) == pytest.approx(theirs)
    assert abs(cider.Cider(sigma=5.0).compute_score(given, made)[0] - theirs) > 1e-4


def test_bleu_by_hand():
    # 1-grams 5 of 6, 2-grams 3 of 5, 3-grams 2 of 4, 4-grams 1 of 3; the closest reference has 7 words.
    made, of = "a b c d x e".split(), ["a b c d e f g".split(), "a".split()]
    expected = math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu_of_words([made], [of]) == pytest.approx(expected)
    # Of two lengths that are as close the shorter one counts: 5, so there is no penalty.
    both = ["a b c d x".split(), "a b c d e f g".split()]
    assert bleu_of_words([made], [both]) == pytest.approx((6 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert bleu_of_words([["a", "a", "a", "a"]], [[["a", "b", "a", "c"]]]) == 0.0
    assert bleu_of_words([[]], [[["a"]]]) == 0.0


def test_nist_by_brute_force():
    made = ["a b a c d".split(), "c d".split(), []]
    of = [["a b c d".split(), "a c d d e".split()], ["c d e".split()], ["a".split()]]

    def count(gram, texts):
        n = len(gram)
        return sum(tuple(text[start : start + n]) == gram for text in texts for start in range(len(text) - n + 1))

    corpus = list(itertools.chain(*of))
    size, total = sum(map(len, corpus)), 0.0
    for n in range(1, 6):
        information, number = 0.0, 0
        for text, references in zip(made, of, strict=True):
            grams = [tuple(text[start : start + n]) for start in range(max(len(text) - n + 1, 0))]
            number += len(grams)
            for gram in set(grams):
                shared = min(grams.count(gram), max(count(gram, [reference]) for reference in references))
                if shared:
                    before = count(gram[:-1], corpus) if n > 1 else size
                    information += shared * math.log2(before / count(gram, corpus))
        total += information / number if number else 0.0
    ratio = 7 / (4.5 + 3 + 1)
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)
    assert nist_of_words(made, of) == pytest.approx(total * penalty) and penalty < 0.9
    assert nist_of_words([[]], [[["a"]]]) == 0.0


def test_rouge_l_by_hand_and_its_subsequence_by_brute_force():
    for first, second in (("abcbdab", "bdcaba"), ("aab", "azb"), ("", "abc"), ("abc", "cba")):
        of_second = {"".join(p) for n in range(len(second) + 1) for p in itertools.combinations(second, n)}
        longest = max(
            n for n in range(len(first) + 1) for p in itertools.combinations(first, n) if "".join(p) in of_second
        )
        assert longest_common(first, second) == longest
    precision, recall = 3 / 4, 3 / 5  # of "a b c d": "a b x c y" has 3 of its words in order
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l_of_words(["a b c d".split()], [["a b x c y".split()]]) == pytest.approx(expected)


def test_cider_by_hand():
    # Each word is in the references of one of two rows, so all weigh log 2, and the cosines are of counts.
    made, of = [["a", "b"], ["c"]], [[["a", "b"]], [["c", "d", "e"]]]
    near = math.exp(-(2**2) / (2 * 6**2))  # two pairs of words against none
    first = 10 * (1 + 1) / 4  # single words and pairs are the same
    second = 10 * near / math.sqrt(3) / 4
    assert cider_of_words(made, of) == pytest.approx((first + second) / 2)
    assert cider_of_words([["a"]], [[["a"]]]) == 0.0  # one row: no word tells anything


@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        ([], [], ValueError, "no predictions, expected at least one"),
        (["a", "b"], [["a"]], ValueError, "2 predictions and 1 lists of references"),
        (["a"], [[]], ValueError, r"references\[0\] has no reference"),
        (["a"], [[None]], ValueError, r"references\[0\] has no reference"),
        (["a"], [["a", " "]], ValueError, r"references\[0\]\[1\] is empty.* None in its place"),
        (["a"], ["a"], TypeError, r"references\[0\] is a str, expected a list of all references"),
        (["a", 5], [["a"], ["5"]], TypeError, r"predictions\[1\] is a int, expected text"),
        (["a", None], [["a"], ["b"]], TypeError, r"predictions\[1\] is a NoneType"),
        (["a"], [["a", 5]], TypeError, r"references\[0\]\[1\] is a int, expected text"),
        ("a", [["a"]], TypeError, "predictions is a str, expected a list"),
        (["a"], None, TypeError, "references is a NoneType, expected a list"),
    ],
)
def test_bad_input_is_said_by_the_functions_and_the_metric(predictions, references, error, message, tmp_path):
    metric = metrics.E2ENLG(cache_dir=str(tmp_path))
    functions = (metrics.bleu, metrics.nist, lambda p, r: metrics.rouge_l(p, r, "ptb-python"), metrics.e2e_scores)
    for function in (*functions, lambda p, r: metric.compute(predictions=p, references=r)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", metrics.NoMeteorWarning)
            with pytest.raises(error, match=message):
                function(predictions, references)
    assert len(metric) == 0  # what was refused was not added


def test_unknown_names_are_said():
    with pytest.raises(ValueError, match="tokenizer is 'treebank', expected one of ptb-java, ptb-python"):
        metrics.cider(["a"], [["a"]], "treebank")
    with pytest.raises(ValueError, match="there is no score 'rouge', expected any of bleu"):
        metrics.e2e_scores(["a"], [["a"]], only=["rouge"])
    with pytest.raises(TypeError, match=r"only is 'bleu', expected a list of scores, such as \['bleu'\]"):
        metrics.e2e_scores(["a"], [["a"]], only="bleu")
    with pytest.raises(ValueError, match="the score is 'rougeL', expected one of bleu"):
        metrics.E2ENLG("rougeL")
    with pytest.raises(AttributeError, match="no attribute 'rougeL'"):
        metrics.rougeL  # noqa: B018


def test_the_metric_of_evaluate_needs_no_network(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it asks a network"))
    predictions, references = sentences("embedded")
    alone = {
        name: metrics.E2ENLG(name, cache_dir=str(tmp_path)).compute(predictions=predictions, references=references)
        for name in ("bleu", "nist")
    }
    assert alone == {
        "bleu": {"bleu": metrics.bleu(predictions, references)},
        "nist": {"nist": metrics.nist(predictions, references)},
    }
    metric = metrics.E2ENLG("rouge_l", cache_dir=str(tmp_path))
    metric.add(prediction=predictions[0], reference=[*references[0], None])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    found = metric.compute(tokenizer="ptb-python")
    assert found == {"rouge_l": metrics.rouge_l(predictions, references, "ptb-python"), "tokenizer": "ptb-python"}
    with pytest.raises(ValueError, match="nothing was added"):
        metric.compute()
    both = evaluate.combine([metrics.E2ENLG(name, cache_dir=str(tmp_path)) for name in ("bleu", "nist")])
    assert both.compute(predictions=predictions, references=references) == {**alone["bleu"], **alone["nist"]}


def test_without_java_meteor_is_none_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(metrics.NoMeteorWarning, match="METEOR is None: there is no command java"):
        found = metrics.E2ENLG(cache_dir=str(tmp_path)).compute(predictions=["A pub."], references=[["A pub."]])
    assert found["meteor"] is None and found["tokenizer"] == "ptb-python" and found["bleu"] == 0.0
    for function in (metrics.meteor, lambda p, r: metrics.rouge_l(p, r, "ptb-java")):
        with pytest.raises(RuntimeError, match="need Java: there is no command java"):
            function(["A pub."], [["A pub."]])
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'hf-sl2o[e2e]'" in java.missing() and metrics.default_tokenizer() == "ptb-python"


def java_that_does(script, tmp_path, monkeypatch):
    for name in (java._TOKENIZER, java._METEOR, java._PARAPHRASES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(java, "_folder", lambda: tmp_path)
    program = tmp_path / "java"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program.write_text(script)
    program.chmod(0o755)


def test_a_command_that_only_asks_for_java_counts_as_none(monkeypatch, tmp_path):
    """As on macOS."""
    java_that_does("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\necho >&2\nexit 1\n", tmp_path, monkeypatch)
    said = "the command java does not run: Unable to locate a Java Runtime; install a Java runtime"
    with pytest.warns(metrics.NoMeteorWarning, match=said):
        found = metrics.e2e_scores(["A pub."], [["A pub."]])
    assert found["meteor"] is None and found["tokenizer"] == "ptb-python"
    with pytest.raises(RuntimeError, match=said):
        metrics.meteor(["A pub."], [["A pub."]])


def test_a_java_that_fails_is_said(monkeypatch, tmp_path):
    """A program of that name that answers half, or nothing: no score is made of it."""
    java_that_does("#!/bin/sh\necho one line\necho 'Error: no memory' >&2\n", tmp_path, monkeypatch)
    assert java.missing() is None
    with pytest.raises(
        RuntimeError, match="PTBTokenizer of pycocoevalcap gave 1 lines for 2 sentences: Error: no mem"
    ):
        java.stanford_words(["a", "b"])
    with pytest.raises(RuntimeError, match="METEOR of pycocoevalcap gave no score: Error: no memory"):
        java.meteor_of_words([["a"]], [[["a"]]])
    (tmp_path / "java").write_text(
        "#!/bin/sh\nprintf 'Picked up X\\nFault: out of order\\n\\tat Meteor.main\\n' >&2\n"
    )
    with pytest.raises(RuntimeError, match="gave no score: Fault: out of order; check"):  # no frame of its trace
        java.meteor_of_words([["a"]], [[["a"]]])


def test_an_empty_sentence_has_no_words_and_lowers_every_score():
    predictions, references = sentences("embedded")
    full = metrics.e2e_scores(predictions, references, tokenizer="ptb-python", only=WITHOUT_JAVA)
    less = metrics.e2e_scores(["", *predictions[1:]], references, tokenizer="ptb-python", only=WITHOUT_JAVA)
    assert all(less[name] < full[name] for name in WITHOUT_JAVA)
    nothing = metrics.e2e_scores([""] * len(predictions), references, tokenizer="ptb-python", only=WITHOUT_JAVA)
    assert Counter(nothing[name] for name in WITHOUT_JAVA) == {0.0: 4}
    assert scores.check_sentences(("a",), ((None, "b"),)) == [["b"]]
