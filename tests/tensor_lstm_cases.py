"""A rule that finds its own scale, written by hand in numpy; rules, tensors and gradients for its tests."""

import numpy as np
import torch

from hf_sl2o import LearnedOptimizer, RuleConfig
from hf_sl2o.rules import TensorLSTMRule

SHAPES = {"a": (3, 5), "b": (4, 3), "bias": (6,), "scalar": (), "conv": (2, 3, 2, 2), "one": (1, 1)}


def a_rule(spread=0.3, seed=0, **changes):
    """With weights of no particular use: every column and every part of the state counts."""
    torch.manual_seed(seed)
    rule = TensorLSTMRule(RuleConfig(**{"per_tensor": 5, "momenta": (0.99,), "tensor_scale": True, **changes}))
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(spread * torch.randn(p.shape))
    return rule


def tensors(shapes=SHAPES, dtype=torch.float64, seed=1):
    """Named parameters; `b` begins at zero, as half of the factors of an adapter do."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * (0 if name == "b" else 0.2 * (i + 1))
        found[name] = values.to(dtype).requires_grad_()
    return found


def gradients(step, shapes=SHAPES, seed=2):
    """They agree from step to step in part, and each tensor has a size of its own."""
    for i, (name, shape) in enumerate(shapes.items()):
        common, own = (torch.Generator().manual_seed(1000 * seed + 50 * i + k) for k in (0, step + 1))
        same, new = (torch.randn(shape, generator=of, dtype=torch.float64) for of in (common, own))
        yield name, 3.0**-i * (0.6 * same + new)


def run(named, optimizer, first, last, scheduler=None, change=None):
    """Takes steps from given gradients; returns the weights after each of them."""
    course = []
    for step in range(first, last):
        for name, g in gradients(step):
            if name in named:
                g = g if change is None else change(step, name, g)
                named[name].grad = None if g is None else g.to(named[name].dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        course.append({name: p.detach().clone() for name, p in named.items()})
    return course


def optimizer_of(named, rule=None, **options):
    return LearnedOptimizer(named.values(), a_rule().double() if rule is None else rule, **options)


def far(found, expected):
    """The largest difference of two sets of tensors, over the size of the tensor in `expected`."""
    assert found.keys() == expected.keys()
    return max(
        float((found[k].double() - expected[k].double()).abs().max() / expected[k].abs().max().clamp_min(1e-30))
        for k in expected
        if expected[k].numel()
    )


def kept(optimizer):
    return {
        (i, key): value
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if torch.is_tensor(value)
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class ByHand:
    """The rule as its documentation describes it, a tensor at a time."""

    def __init__(self, rule, weights, rate=1.0):
        self.config = rule.config
        self.w = {name: value.double().numpy() for name, value in rule.state_dict().items()}
        self.of = []
        for theta in weights:
            theta = theta.detach().double().numpy().copy()
            rms = np.sqrt(np.square(theta).mean())
            if theta.ndim < 2:
                size, kind = 0.03, 2
            else:
                size, kind = (rms, 0) if rms > 0 else ((3 * max(theta.shape)) ** -0.5, 1)
            h = self.config.per_tensor
            zeros = {"m": 0 * theta, "v": 0 * theta, "slow": [0 * theta for _ in self.config.momenta]}
            self.of.append(
                {
                    **zeros, "theta": theta, "t": 0, "log size": np.log(size) + self.w["guess"][kind],
                    "kind": np.eye(3)[kind], "length": np.log(np.clip(rate, 0.1, 10.0)), "rate": rate,
                    "hidden": np.zeros(h), "cell": np.zeros(h),
                }
            )  # fmt: skip

    def facts(self, x, g):
        """What is measured of a tensor, with the momenta of the step before."""
        v = 0.99 * x["v"] + 0.01 * g * g
        s, rms = np.sqrt((v / (1 - 0.99 ** x["t"])).mean()), np.sqrt((g * g).mean())
        found = [np.clip(np.log(rms / s), -3, 3)]
        for beta, average in ((0.9, x["m"]), *zip(self.config.momenta, x["slow"], strict=True)):
            lengths = np.linalg.norm(g) * np.linalg.norm(average)
            found.append((g * average).sum() / lengths if lengths else 0.0)
            corrected = average / max(1 - beta ** (x["t"] - 1), 1 - beta)
            found.append(np.sqrt(np.square(corrected).mean()) / s)
        return np.array(found), s

    def step(self, gs, rate, weight_decay=0.0):
        """One step over all tensors; `gs` in their order."""
        seen = []
        for x, g in zip(self.of, gs, strict=True):
            x["t"] += 1
            seen.append(self.facts(x, g))
        mean = np.mean([facts for facts, _ in seen], axis=0)
        for x, g, (facts, s) in zip(self.of, gs, seen, strict=True):
            t, share = x["t"], rate / x["rate"]
            always = [np.exp(-t / 4), np.exp(-t / 30), np.exp(-t / 200), share, x["length"] / 3, *x["kind"], 1]
            self.network(x, np.concatenate([facts, mean, mean * np.exp(-t / 30), 0.1 * np.array(always)]))
            x["steps"] = share * np.exp(x["length"] + x["log size"])
            x["theta"] = x["theta"] * (1 - x["steps"] * weight_decay) - x["steps"] * self.direction(x, g, s)

    def network(self, x, seen):
        w = self.w
        gates = w["lstm.weight_ih"] @ seen + w["lstm.bias_ih"] + w["lstm.weight_hh"] @ x["hidden"] + w["lstm.bias_hh"]
        i, f, a, o = np.split(gates, 4)
        x["cell"] = sigmoid(f) * x["cell"] + sigmoid(i) * np.tanh(a)
        x["hidden"] = sigmoid(o) * np.tanh(x["cell"])
        change = 0.25 * np.tanh(w["change.weight"][0] @ np.concatenate([seen, 0.1 * x["hidden"]]))
        x["length"] += change - 0.005 * x["length"]

    def direction(self, x, g, s):
        t, eps = x["t"], self.config.eps
        x["m"], x["v"] = 0.9 * x["m"] + 0.1 * g, 0.99 * x["v"] + 0.01 * g * g
        x["slow"] = [beta * old + (1 - beta) * g for beta, old in zip(self.config.momenta, x["slow"], strict=True)]
        m, v = x["m"] / (1 - 0.9**t), x["v"] / (1 - 0.99**t)
        root = np.sqrt(v) + eps
        slow = [old / (1 - beta**t) / root for beta, old in zip(self.config.momenta, x["slow"], strict=True)]
        columns = np.stack([m / root, g / root, *slow, m / (s + eps), g / (s + eps)], axis=-1)
        mix = self.w["mix.weight"] @ np.concatenate([[1], x["hidden"]])
        rest = np.minimum(np.maximum(np.abs(m / root), np.abs(g / root)) / 0.03, 1)
        return v / (v + eps**2 + (1e-6 * s) ** 2) * rest * 1.5 * np.tanh(columns @ mix / 1.5)
