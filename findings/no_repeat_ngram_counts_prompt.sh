#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, Python 3.11 or newer.
# Expected: no_repeat_ngram_size=4 forbids a model to write four tokens twice.
# Happens: with a decoder-only model the prompt counts as written: a name of four tokens or more that stands in the prompt
# cannot be written at all, not even once, and its fourth token becomes another one. With an encoder and decoder the same
# setting lets it through. So the setting of data-to-text papers (E2E: beam 10, no-repeat 4) means another thing here.
# What to do: pass a LogitsProcessor of your own that looks only at what comes after the prompt.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1

venv/bin/python - <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
NAME = [11, 12, 13, 14, 15]


class Wish(LogitsProcessor):
    """Each next token of the name, unless it is forbidden."""

    def __init__(self, first):
        self.first = first

    def __call__(self, input_ids, scores):
        scores[:, NAME[input_ids.shape[1] - self.first]] += 1e4
        return scores


def written(model, prompt, first, **options):
    torch.manual_seed(0)
    wish = LogitsProcessorList([Wish(first)])
    made = model.eval().generate(
        torch.tensor([prompt]), logits_processor=wish, max_new_tokens=5, do_sample=False, pad_token_id=0, **options
    )
    return made[0, first:].tolist()


torch.manual_seed(0)
gpt = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2, bos_token_id=0, eos_token_id=1))
t5 = T5ForConditionalGeneration(
    T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
)
prompt = [2, *NAME, 3]
free = written(gpt, prompt, len(prompt))
decoder = written(gpt, prompt, len(prompt), no_repeat_ngram_size=4)
both = written(t5, prompt, 1, no_repeat_ngram_size=4)
print("name in the prompt:           ", NAME)
print("GPT-2:                        ", free)
print("GPT-2, no_repeat_ngram_size=4:", decoder)
print("T5, no_repeat_ngram_size=4:   ", both)
assert free == NAME and both == NAME
assert decoder[:3] == NAME[:3] and decoder[3] != NAME[3], decoder
PY

# Expected output:
# name in the prompt:            [11, 12, 13, 14, 15]
# GPT-2:                         [11, 12, 13, 14, 15]
# GPT-2, no_repeat_ngram_size=4: [11, 12, 13, 13, 15]
# T5, no_repeat_ngram_size=4:    [11, 12, 13, 14, 15]
