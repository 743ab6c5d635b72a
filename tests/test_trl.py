"""TRL's trainers with `optim="sl2o"` and nothing else said train: their arguments bring rates for Adam along."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import hf_sl2o

trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # trl's own and what it calls

SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>"]
WORDS = [f"w{i}" for i in range(40)] + ["good", "bad"]


def tokenizer():
    known = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<bos>"
    )


def config(**more):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    return LlamaConfig(vocab_size=len(SPECIAL + WORDS), max_position_embeddings=64, **sizes, **special, **more)


def counting(rows=128):
    return Dataset.from_dict({"text": [" ".join(f"w{(i + k) % 40}" for k in range(12)) for i in range(rows)]})


def preferences(rows=128):
    prompts = [f"w{i % 40} w{(i + 1) % 40}" for i in range(rows)]
    chosen = [f" w{(i + 2) % 40} good" for i in range(rows)]
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": [" w7 bad"] * rows})


KINDS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, LlamaForCausalLM, counting),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, LlamaForCausalLM, preferences),
    "reward": (trl.RewardTrainer, trl.RewardConfig, LlamaForSequenceClassification, preferences),
}


def train(kind, folder, optimizer=None, **options):
    trainer, arguments, model, data = KINDS[kind]
    torch.manual_seed(0)
    model(config(num_labels=1) if kind == "reward" else config()).save_pretrained(folder / "start")
    network = model.from_pretrained(folder / "start")  # from where DPO takes its reference, too
    args = arguments(
        output_dir=str(folder), optim="sl2o", max_steps=24, per_device_train_batch_size=8, use_cpu=True, bf16=False,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=4, gradient_checkpointing=False,
        **options,
    )  # fmt: skip
    given = {} if optimizer is None else {"optimizers": (optimizer(network), None)}
    run = trainer(model=network, args=args, train_dataset=data(), processing_class=tokenizer(), **given)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_default_arguments_train_as_the_own_rate_does(kind, tmp_path, caplog):
    default = KINDS[kind][1](output_dir=str(tmp_path), bf16=False, use_cpu=True).learning_rate
    assert default < 1e-3  # what a script brings along
    unmodified = train(kind, tmp_path / "a")
    assert "takes its own step size, 1" in caplog.text
    assert unmodified == train(kind, tmp_path / "b", learning_rate=1.0)
    assert unmodified[-1] < 0.85 * unmodified[0]
    # the break: that rate taken literally moves nothing, if the rule does not find its own scale
    rule = hf_sl2o.training.build.load_rule("paper-cnn", with_basis=False)
    still = train(kind, tmp_path / "c", lambda model: hf_sl2o.LearnedOptimizer(model, rule, lr=default))
    assert still[-1] > 0.95 * still[0]
