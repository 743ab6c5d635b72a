"""Small models and bases that many tests share."""

import gc
import os

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from hf_sl2o import DenseBasis, Layout

os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.disable_progress_bar()


#: Files that take longest, which begin first: else one of two workers has nothing to do at the end.
LONGEST = (
    "test_recipe", "test_docs", "test_resnet_recipe", "test_benchmarks", "test_vit_recipe", "test_fuzz", "test_ranks",
    "test_distributed", "test_launch", "test_fsdp2", "test_meta_recipes", "test_meta_distributed", "test_hooks",
    "test_comparison", "test_kept_run", "test_benchmark_meta", "test_kills", "test_run", "test_vit_imagenet",
    "test_files", "test_hub", "test_trainer", "test_programs_trl", "test_programs", "test_programs_peft", "test_site",
    "test_commands_tasks", "test_commands_hub", "test_commands_page", "test_report_browser", "test_generate",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # the order within a file stays


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # each Trainer.train() collects garbage, and would look through all that is imported


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_gpt2(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=50, n_layer=2, n_head=2, n_embd=16, n_positions=16, bos_token_id=0, eos_token_id=0)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model = GPT2LMHeadModel(config).to(dtype)
    model.loss_type = "ForCausalLM"
    return model


def random_dense(named_parameters, dim=6, seed=1, dtype=torch.float32, units=None):
    """A basis with exactly orthonormal random directions."""
    layout = Layout.from_named_parameters(named_parameters)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(layout.n, dim, generator=generator, dtype=torch.float64))[0].T.to(dtype)
    parts = [part.contiguous() for part in matrix.split(list(layout.numels), dim=1)]
    compute = torch.promote_types(torch.float32, dtype)
    units = torch.linspace(0.5, 2.0, dim, dtype=compute) if units is None else units
    return DenseBasis(layout, parts, units)


class Tokens(torch.utils.data.Dataset):
    """Fixed random sentences."""

    def __init__(self, rows=64, length=12, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 50, (rows, length), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.fixture
def model():
    return tiny_gpt2()


@pytest.fixture
def basis(model):
    return random_dense(model.named_parameters())
