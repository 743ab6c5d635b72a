#!/usr/bin/env bash
# sacrebleu 2.6.0, Python 3.11 or newer.
# Expected: where answers have different numbers of references, the missing ones may be "" or None, as the
# docstring of _cache_references says.
# Happens: only None is left out. "" counts as a reference of length 0, and for an answer of less than half the
# true one's length it is the closest: nothing is added to the reference length, and the brevity penalty goes
# away: BLEU 72 instead of 38 below.
# What to do: pad with None.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q sacrebleu==2.6.0

venv/bin/python - <<'PY'
import sacrebleu

# Two meanings: the first has two references, the second has one, and its answer is far too short.
answers = ["the mill is a cheap pub", "it is by the river"]
first = ["the mill is a cheap pub", "a family place stands by the river near the old town bridge"]

whole, second = {}, {}
for padding in (None, ""):
    whole[padding] = sacrebleu.corpus_bleu(answers, [first, ["the mill is a cheap little pub", padding]])
    second[padding] = sacrebleu.corpus_bleu(answers[1:], [first[1:], [padding]])
    for name, score in {"both answers": whole[padding], "second alone": second[padding]}.items():
        print(f"padded with {padding!r:<4}, {name}: reference length {score.ref_len}, "
              f"brevity penalty {score.bp:.3f}, BLEU {score.score:.2f}")

assert whole[None].ref_len == 18 and whole[None].bp < 1, whole
assert whole[""].ref_len == 6 and whole[""].bp == 1, whole
assert second[None].ref_len == 12 and second[None].bp < 1, second
assert second[""].ref_len == 0 and second[""].bp == 1, second
PY

# Expected output:
# padded with None, both answers: reference length 18, brevity penalty 0.529, BLEU 38.24
# padded with None, second alone: reference length 12, brevity penalty 0.247, BLEU 9.81
# padded with ''  , both answers: reference length 6, brevity penalty 1.000, BLEU 72.27
# padded with ''  , second alone: reference length 0, brevity penalty 1.000, BLEU 39.76
