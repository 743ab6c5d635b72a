"""Optimizers that promise no tuning: each in `train_on` and `compare_on` beside its library's own loop."""

import builtins
import dataclasses
import sys

import pytest
import torch
from torch import nn

from hf_sl2o import IdentityBasis, Layout, Task, train_on
from hf_sl2o.experiments import rivals
from hf_sl2o.experiments.on_task import TaskArm, compare_on

dadaptation = pytest.importorskip("dadaptation")
dog = pytest.importorskip("dog")
prodigyopt = pytest.importorskip("prodigyopt")
schedulefree = pytest.importorskip("schedulefree")

STEPS = 25


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU(), nn.Linear(16, 2))


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(8, 3, 2, 2, generator=generator)
        yield x, torch.stack([x.sum(dim=(1, 2, 3)), x[:, 0].mean(dim=(1, 2))], dim=1)


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def held_out(model):
    model.eval()
    batch = next(data(77))
    with torch.no_grad():
        value = squared(model, batch).item()
    model.train()
    return value


@pytest.fixture
def task():
    basis = IdentityBasis(Layout.from_named_parameters(network().named_parameters()))
    return Task("toy", network, data, squared, basis, [next(data(77))])


def muon_parts(model, lr=1e-3):
    """Muon over the same memory as matrices, torch's AdamW over the vectors."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    views = {name: nn.Parameter(p.detach().view(len(p), -1)) for name, p in matrices.items()}
    vectors = [p for p in model.parameters() if p.ndim == 1]
    both = torch.optim.Muon(views.values(), lr=lr), torch.optim.AdamW(vectors, lr=lr)

    def step():
        for name, p in matrices.items():
            views[name].grad = p.grad.view(len(p), -1)
        for part in both:
            part.step()

    return both, step


BARE = {
    "prodigy": (lambda p: prodigyopt.Prodigy(p), True),
    "dadapt_adam": (lambda p: dadaptation.DAdaptAdam(p), True),
    "dog": (lambda p: dog.DoG(p), False),
    "schedule_free": (lambda p: schedulefree.AdamWScheduleFree(p), False),
    "adamw_2e-4": (lambda p: torch.optim.AdamW(p, 2e-4, weight_decay=0.0), True),
    "adamw_1e-3": (lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0), True),
    "muon": (None, True),
}


def bare(name, steps=STEPS):
    """The library's loop: training losses, and the held-out loss at the end as its authors evaluate it."""
    make, decays = BARE[name]
    model, averager, losses = network(), None, []
    if make is None:
        parts, step = muon_parts(model)
    else:
        parts = (make(model.parameters()),)
        step = parts[0].step
    if name == "dog":
        averager = dog.PolynomialDecayAverager(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(part, lambda t: (steps - t) / steps) for part in parts if decays]
    batches = data(0)
    if name == "schedule_free":
        parts[0].train()
    for _ in range(steps):
        model.zero_grad()
        loss = squared(model, next(batches))
        loss.backward()
        step()
        for schedule in schedules:
            schedule.step()
        if averager is not None:
            averager.step()
        losses.append(loss.item())
    if name == "schedule_free":
        parts[0].eval()
    return losses, held_out(model if averager is None else averager.averaged_model)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # Muon's step is called by hand
@pytest.mark.parametrize("name", [name for name in rivals.RIVALS if name != rivals.TUNED])
def test_an_arm_is_its_librarys_own_loop(name, task, tmp_path):
    arm = rivals.RIVALS[name]
    (run,) = compare_on(task, {name: arm}, STEPS, seeds=1, cache=tmp_path).values()
    (lr,) = arm.learning_rates
    losses, end = bare(name)
    given = {"schedule": arm.schedule or "linear", "average": arm.average}
    ours = train_on(task, arm.make(lr), STEPS, evaluate_at=(0, STEPS), **given)
    assert ours["train_loss"] == pytest.approx(losses, rel=3e-6)
    assert ours["eval"][-1] == [STEPS, pytest.approx(end, rel=3e-6)]
    assert run["final_eval_loss"] == ours["eval"][-1][1] and run["learning_rate"] == lr
    assert abs(ours["eval"][0][1] - end) > 1e-5 * end  # DoG begins with steps of 1e-6
    # Deliberate breaks: another schedule, no average or one too many.
    other = "constant" if given["schedule"] == "linear" else "linear"
    for changed in ({"schedule": other}, {"average": 8.0 - arm.average}):
        broken = train_on(task, arm.make(lr), STEPS, evaluate_at=(STEPS,), **{**given, **changed})
        assert abs(broken["eval"][0][1] - end) > 5e-6 * end, changed


def test_rates_are_the_authors_own():
    models = [list(network().parameters()) for _ in range(4)]
    makers = prodigyopt.Prodigy, dadaptation.DAdaptAdam, dog.DoG, schedulefree.AdamWScheduleFree
    for name, make, parameters in zip(rivals.PACKAGES, makers, models, strict=True):
        assert make(parameters).defaults["lr"] == rivals.RIVALS[name].learning_rates[0], name
    matrices = [nn.Parameter(torch.zeros(2, 3))]
    assert torch.optim.Muon(matrices).defaults["lr"] == rivals.RIVALS["muon"].learning_rates[0]
    assert dog.PolynomialDecayAverager(network()).gamma == rivals.RIVALS["dog"].average


def test_muon_takes_factors_of_convolutions_for_matrices_and_leaves_vectors_to_adamw():
    model = network()
    optimizer = rivals.MuonBesideAdamW(model.parameters(), 1e-3)
    kinds = {group["params"][0].ndim: group for group in optimizer.param_groups}
    assert [tuple(p.shape) for p in kinds[2]["params"]] == [(4, 3), (2, 16)] and "ns_steps" in kinds[2]
    assert [tuple(p.shape) for p in kinds[1]["params"]] == [(4,), (2,)] and "betas" in kinds[1]
    squared(model, next(data(0))).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all((p - old).abs().max() > 0 for p, old in zip(model.parameters(), before, strict=True))


def test_runs_of_adamw_at_one_rate_are_one_run(task, tmp_path):
    chosen = {name: rivals.RIVALS[name] for name in ("adamw_1e-3", rivals.TUNED)}
    runs = compare_on(task, chosen, 40, seeds=2, cache=tmp_path)
    names = sorted(path.name for path in (tmp_path / "toy").iterdir())
    assert names.count("adamw-0.001-seed-0.json") == 1 and not [name for name in names if name.startswith("adamw_")]
    assert runs[rivals.TUNED]["final_eval_loss"] <= runs["adamw_1e-3"]["final_eval_loss"]
    assert len(runs[rivals.TUNED]["grid"]) > 3  # the best rate of this problem is at the edge


def test_an_arm_keeps_its_own_schedule(task, tmp_path):
    def sgd(lr):
        return lambda c: torch.optim.SGD(c, lr=lr)

    arms = {"falls": TaskArm(sgd, (0.01,)), "stays": TaskArm(sgd, (0.01,), schedule="constant")}
    first = compare_on(task, arms, 20, seeds=1, cache=tmp_path)
    assert first["falls"]["final_eval_loss"] != first["stays"]["final_eval_loss"]
    arms["falls"] = dataclasses.replace(arms["falls"], schedule="constant")  # what was kept is not taken for it
    again = compare_on(task, arms, 20, seeds=1, cache=tmp_path)
    assert again["falls"]["final_eval_loss"] == first["stays"]["final_eval_loss"]


def test_runs_of_other_data_or_another_start_are_not_taken(task, tmp_path):
    arms = {"sgd": TaskArm(lambda lr: lambda c: torch.optim.SGD(c, lr=lr), (0.01,))}
    runs = [compare_on(task, arms, 20, seeds=1, cache=tmp_path)["sgd"]["eval"]]

    def moved():
        model = network()
        next(model.parameters()).data += 0.1
        return model

    changes = (
        {"batches": lambda seed: data(seed + 7)},
        {"eval_batches": [next(data(9))]},
        {"build_model": moved},
    )
    for change in changes:
        changed = dataclasses.replace(task, **change)
        runs.append(compare_on(changed, arms, 20, seeds=1, cache=tmp_path)["sgd"]["eval"])
        assert runs[-1] == compare_on(changed, arms, 20, seeds=1, cache=tmp_path / str(len(runs)))["sgd"]["eval"]
    assert len({str(curve) for curve in runs}) == len(runs)


def test_an_optimizer_sees_the_weights_themselves(task):
    """Of an identity basis; weight decay then shrinks the weights, as in a plain loop."""
    seen = []

    def look(c):
        seen.extend(p.detach().clone() for p in c)
        return torch.optim.AdamW(c, lr=0.01, weight_decay=0.5)

    ours = train_on(task, look, 10)
    assert all(torch.equal(p, c) for p, c in zip(network().parameters(), seen, strict=True))
    model = network()
    optimizer, batches, losses = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5), data(0), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = squared(model, next(batches))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert ours["train_loss"] == pytest.approx(losses, rel=1e-5)
    without = train_on(task, lambda c: torch.optim.AdamW(c, lr=0.01, weight_decay=0.0), 10)["train_loss"]
    assert max(abs(a - b) for a, b in zip(without, losses, strict=True)) > 1e-3  # a break is seen


class NoPoints(torch.optim.Optimizer):
    """Schedule-free AdamW without its `train` and `eval`: a deliberate break."""

    def __init__(self, c):
        self.inner = schedulefree.AdamWScheduleFree(c)
        self.inner.train()
        super().__init__(c, {"lr": 0.0025})

    def step(self, closure=None):
        self.inner.step()


def test_schedule_free_is_evaluated_at_its_own_point_and_a_look_changes_nothing(task):
    arm = rivals.RIVALS["schedule_free"]
    seldom = train_on(task, arm.make(0.0025), STEPS, evaluate_at=(STEPS,))
    often = train_on(task, arm.make(0.0025), STEPS, evaluate_at=range(STEPS + 1))
    assert often["train_loss"][:1] == seldom["train_loss"][:1]
    assert often["train_loss"] == pytest.approx(seldom["train_loss"], rel=1e-5)
    assert often["eval"][0][1] == pytest.approx(held_out(network()), rel=1e-6)
    _, end = bare("schedule_free")
    broken = train_on(task, NoPoints, STEPS, evaluate_at=(STEPS,))
    assert broken["train_loss"] == pytest.approx(seldom["train_loss"], rel=1e-5)
    assert abs(broken["eval"][0][1] - end) > 1e-3 * end > 100 * abs(seldom["eval"][0][1] - end)


@pytest.mark.parametrize("name", list(rivals.PACKAGES))
def test_a_missing_package_is_named_with_what_to_type(name, monkeypatch):
    module, package = rivals.PACKAGES[name]
    real = builtins.__import__

    def without(wanted, *args, **options):
        if wanted.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real(wanted, *args, **options)

    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr("importlib.import_module", lambda wanted: without(wanted))
    with pytest.raises(
        ImportError, match=rf"the arm {name}: there is no package {package}; pip install {package}, or"
    ):
        rivals.check_rivals(["muon", name])
    rivals.check_rivals(["muon", "adamw"])
