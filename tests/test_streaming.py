"""Gradients that are projected as backward makes them: the run of kept gradients, and nothing of them is left."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_sl2o import LSTMRule, RuleConfig, SL2OTrainer, SL2OTrainingArguments, SubspaceOptimizer, build_optimizer
from tests.conftest import Tokens, random_dense, tiny_gpt2


def sgd(c):
    return torch.optim.SGD(c, lr=0.05)


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def batch(seed, rows=16):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    return (model(x.to(next(model.parameters()).dtype)) - 1).square().mean()


def made(stream, model=None, inner=sgd, **options):
    model = net() if model is None else model
    optimizer = SubspaceOptimizer(
        model, random_dense(model.named_parameters(), dim=6), inner, stream_gradients=stream, **options
    )
    return model, optimizer


def flat(model):
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])


def run(stream, steps=6, micro=1, clip=None, model=None, **options):
    model, optimizer = made(stream, model, **options)
    for step in range(steps):
        for part in batch(step).chunk(micro):
            (loss_of(model, part) / micro).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return flat(model), optimizer.coefficients


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("average", [0.0, 9.0])
def test_run_is_that_of_kept_gradients(micro, average):
    kept, streamed = run(False, average=average), run(True, micro=micro, average=average)
    torch.testing.assert_close(streamed, kept, rtol=1e-4, atol=1e-6)
    other = run(True, steps=5, micro=micro, average=average)
    assert float((other[1] - kept[1]).abs().max()) > 1e-3


def test_only_the_carrier_has_a_gradient_and_it_is_the_projected_one():
    model, optimizer = made(True)
    plain = net()
    loss_of(plain, batch(0)).backward()
    loss_of(model, batch(0)).backward()
    having = [p for p in model.parameters() if p.grad is not None]
    assert having == [optimizer.streamer.carrier]
    projected = optimizer.basis.project([p.grad for p in plain.parameters()])
    torch.testing.assert_close(optimizer.projected_gradient(), projected, rtol=1e-5, atol=1e-7)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, projected.norm(), rtol=1e-5, atol=0)
    loss_of(model, batch(1)).backward()  # a second backward adds
    loss_of(plain, batch(1)).backward()
    projected = optimizer.basis.project([p.grad for p in plain.parameters()])
    torch.testing.assert_close(optimizer.projected_gradient(), projected, rtol=1e-5, atol=1e-7)
    model.zero_grad()
    assert optimizer.streamer.gradient is None
    before = flat(model)
    optimizer.step()  # nothing to do
    assert torch.equal(flat(model), before)


def test_clipping_from_outside_is_that_of_the_optimizer():
    outside, inside = run(True, clip=0.01), run(False, max_grad_norm=0.01)
    torch.testing.assert_close(outside, inside, rtol=1e-3, atol=1e-6)
    assert float((run(True)[1] - inside[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype(dtype):
    kept, streamed = (run(stream, model=net(dtype=dtype)) for stream in (False, True))
    torch.testing.assert_close(streamed[1], kept[1], rtol=1e-3, atol=1e-5)
    model, optimizer = made(True, net(dtype=dtype))
    loss_of(model, batch(0)).backward()
    assert optimizer.streamer.carrier.grad.dtype == torch.promote_types(dtype, torch.float32)


def test_live_gradients_are_no_more_than_the_largest_parameter():
    sizes = {}
    for stream in (False, True):
        model, _ = made(stream)
        carrier = 40 if stream else 0  # its own .grad stays
        most = 0

        def count(p, model=model):
            nonlocal most
            most = max(most, sum(q.grad.numel() for q in model.parameters() if q.grad is not None))

        # before the optimizer's hook a gradient is there, so that it is counted at its birth
        for p in model.parameters():
            hooks = p._post_accumulate_grad_hooks
            known = dict(hooks) if hooks else {}
            if known:
                hooks.clear()
            p.register_post_accumulate_grad_hook(count)
            p._post_accumulate_grad_hooks.update(known)
        loss_of(model, batch(0)).backward()
        sizes[stream] = most - carrier
    assert sizes[True] <= max(p.numel() for p in model.parameters()) < sizes[False]


def test_autograd_grad_returns_gradients():
    model, optimizer = made(True)
    found = torch.autograd.grad(loss_of(model, batch(0)), list(model.parameters()))
    plain = net()
    expected = torch.autograd.grad(loss_of(plain, batch(0)), list(plain.parameters()))
    torch.testing.assert_close(found, expected)
    assert optimizer.streamer.gradient is None and not optimizer.streamer._pending


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    def gpt2_run(stream):
        model = tiny_gpt2(seed=0)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        _, optimizer = made(stream, model)
        ids = torch.arange(24).view(2, 12) % 50
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.coefficients

    torch.testing.assert_close(gpt2_run(True), gpt2_run(False), rtol=1e-4, atol=1e-6)


def test_tied_weights_count_once():
    config = GPT2Config(vocab_size=50, n_layer=1, n_head=2, n_embd=16, n_positions=16, bos_token_id=0, eos_token_id=0)
    results = []
    for stream in (False, True):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        assert model.lm_head.weight is model.transformer.wte.weight
        model, optimizer = made(stream, model.eval())
        ids = torch.arange(10)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        results.append(optimizer.projected_gradient())
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        assert ("lm_head.weight" in ignored) == stream  # under both names, or DDP sends it
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_adapter_of_peft():
    results = []
    for stream in (False, True):
        torch.manual_seed(0)
        peft = get_peft_model(tiny_gpt2(seed=0), LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True))
        model, optimizer = made(stream, peft.eval())
        ids = torch.arange(10)[None]
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(optimizer.coefficients)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_backward_that_did_not_end_is_forgotten():
    model, optimizer = made(True)

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise MemoryError("out of memory")

    x = torch.tanh(model[0](batch(0)))
    with pytest.raises(MemoryError):
        model[4](torch.tanh(model[2](Breaks.apply(x)))).square().mean().backward()
    assert optimizer.streamer._pending
    model.zero_grad()
    loss_of(model, batch(0)).backward()
    plain = net()
    loss_of(plain, batch(0)).backward()
    projected = optimizer.basis.project([p.grad for p in plain.parameters()])
    torch.testing.assert_close(optimizer.projected_gradient(), projected, rtol=1e-5, atol=1e-7)


def test_gradient_that_is_not_finite_skips_the_step():
    model, optimizer = made(True)
    before = flat(model)
    (loss_of(model, batch(0)) * float("inf")).backward()
    optimizer.step()
    assert torch.equal(flat(model), before) and optimizer.skipped_steps == 1


def test_scaler_unscales_and_skips():
    def scaled(stream):
        model, optimizer = made(stream)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)
        steps = 0
        for step in range(12):
            scaler.scale(1e4 * loss_of(model, batch(step))).backward()
            scaler.unscale_(optimizer)
            before = flat(model)
            scaler.step(optimizer)
            scaler.update()
            steps += int(not torch.equal(before, flat(model)))
            optimizer.zero_grad()
        return steps, optimizer.coefficients

    (kept_steps, kept), (steps, streamed) = scaled(False), scaled(True)
    assert 0 < steps == kept_steps < 12
    torch.testing.assert_close(streamed, kept, rtol=1e-3, atol=1e-6)


def test_later_optimizer_gets_the_gradients():
    model, first = made(True)
    _, second = made(True, model)
    loss_of(model, batch(0)).backward()
    assert second.streamer.gradient.abs().sum() > 0 and first.streamer._pending == {}
    second.detach()
    model.zero_grad()
    loss_of(model, batch(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_go_with_the_optimizer_and_copies_are_without():
    model, optimizer = made(True)
    copied = copy.deepcopy(model)
    loss_of(copied, batch(0)).backward()
    assert all(p.grad is not None for p in copied.parameters())
    del optimizer
    gc.collect()
    loss_of(model, batch(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_input():
    model = net()
    basis = random_dense(model.named_parameters(), dim=6)
    with pytest.raises(ValueError, match="pass the model itself"):
        SubspaceOptimizer(model.named_parameters(), basis, sgd, stream_gradients=True)
    small = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least d = 6 numbers, and the largest that is covered has 4"):
        SubspaceOptimizer(small, random_dense(small.named_parameters(), dim=6), sgd, stream_gradients=True)
    with pytest.raises(ValueError, match="stream_gradients was given"):
        build_optimizer(model, "sl2o", stream_gradients=True)
    with pytest.raises(NotImplementedError, match="only the projected gradient is kept"):
        made(True)[1].gradient_share()


# In a Trainer


def trained(tmp_path, stream, plain=False, **options):
    model = tiny_gpt2(seed=0)
    model.loss_type = "ForCausalLM"
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True,
                "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_grad_norm": 0.05}  # fmt: skip
    basis = random_dense(model.named_parameters(), dim=6)
    torch.manual_seed(2)
    if plain:
        basis.save_pretrained(tmp_path / "basis")
        text = f"basis={tmp_path / 'basis'},stream_gradients={'true' if stream else 'false'}"
        args = TrainingArguments(str(tmp_path / "out"), optim="subspace_adamw", learning_rate=0.1, optim_args=text,
                                 **{**settings, **options})  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Tokens())
    else:
        args = SL2OTrainingArguments(str(tmp_path / "out"), sl2o_stream_gradients=stream, **{**settings, **options})
        rule = LSTMRule(RuleConfig(output_scale=0.3))
        trainer = SL2OTrainer(model, args, train_dataset=Tokens(), basis=basis, rule=rule)
    trainer.train()
    return trainer, flat(model)


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"bf16": True},
    {"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"sl2o_average": 9.0},
], ids=["plain", "accumulation", "autocast", "compile", "average"])  # fmt: skip
def test_trainer_trains_alike(tmp_path, options):
    kept, weights = trained(tmp_path / "kept", False, **options)
    streamed, others = trained(tmp_path / "streamed", True, **options)
    assert streamed.subspace_optimizer.streamer is not None and kept.subspace_optimizer.streamer is None
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-5)
    norms = [[entry["grad_norm"] for entry in of.state.log_history if "grad_norm" in entry] for of in (kept, streamed)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2) and len(norms[0]) == 4


def test_plain_trainer_by_its_optim_args(tmp_path):
    _, weights = trained(tmp_path / "kept", False, plain=True)
    streamed, others = trained(tmp_path / "streamed", True, plain=True)
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-5)
    assert streamed.optimizer.optimizer.streamer is not None
    with pytest.raises(ValueError, match="expected true or false"):
        trained_args = TrainingArguments(
            str(tmp_path), optim="sl2o", optim_args="basis=x,stream_gradients=yes", use_cpu=True, report_to="none"
        )
        Trainer(tiny_gpt2(seed=0), trained_args, train_dataset=Tokens()).create_optimizer()


def test_resume_is_the_uninterrupted_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, weights = trained(tmp_path / "whole", True, **options)
    model = tiny_gpt2(seed=0)
    model.loss_type = "ForCausalLM"
    basis = random_dense(model.named_parameters(), dim=6)
    torch.manual_seed(2)
    rule = LSTMRule(RuleConfig(output_scale=0.3))
    resumed = SL2OTrainer(model, whole.args, train_dataset=Tokens(), basis=basis, rule=rule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert torch.equal(flat(model), weights)
