"""The recipes that make, judge and study learned optimizers, at toy size: they run, go on after a kill, and agree."""

import dataclasses
import itertools
import json

import pytest
import torch

from hf_sl2o import LSTMRule, Rule, RuleConfig
from hf_sl2o.experiments import plans as plans_of
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.tasks import named as meta_tasks
from hf_sl2o.experiments.tasks import problems
from hf_sl2o.experiments.tasks.named import parse_task
from recipes import evaluate_rules, meta_train, pretrain_base
from recipes.studies import average as study_average
from recipes.studies import estimators as study_estimators
from recipes.studies import inputs as study_inputs
from recipes.studies import transfer as study_transfer
from recipes.studies import unroll as study_unroll

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture
def short(monkeypatch):
    """Problems whose recorded runs and bases take 120 steps."""

    def shortened(make):
        return lambda data: dataclasses.replace(make(data), steps=120)

    for name in ("quadratic", "digits-mlp"):
        monkeypatch.setitem(problems.PROBLEMS, name, shortened(problems.PROBLEMS[name]))


@pytest.fixture
def plans(monkeypatch):
    for name, tasks in (
        ("default", ("digits-mlp@8",)),
        ("default-lora", ("digits-mlp-lora2",)),
    ):
        plan = plans_of.PLANS[name]
        stages = tuple(dataclasses.replace(stage, tasks=tasks) for stage in plan.stages)
        monkeypatch.setitem(plans_of.PLANS, name, dataclasses.replace(plan, stages=stages))


SMALL = ["--meta_epochs", "2", "--inner_steps", "20", "--unroll_length", "10", "--use_cpu", "--disable_tqdm"]


@pytest.mark.parametrize("rule", ["default", "default-lora"])
def test_a_rule_is_made_and_judged(rule, short, plans, tmp_path, capsys):
    folder = ["--output_dir", str(tmp_path)]
    made = meta_train.main(["--rule", rule, *SMALL, *folder, "--save_to", str(tmp_path / "rule")])
    assert made["finished"] and all(len(stage["validation"]) >= 2 for stage in made["stages"])
    # A stage begins with the best rule of the one before: the same held-out losses.
    for before, after in itertools.pairwise(made["stages"]):
        best = min(before["validation"], key=lambda entry: entry["score"])
        assert after["validation"][0]["validation"] == best["validation"]
        assert any(entry["validation"] != best["validation"] for entry in before["validation"])
    known = json.loads((tmp_path / "rule" / "provenance.json").read_text())
    assert known["command"].startswith("python recipes/meta_train.py --rule") and known["tasks"] == made["tasks"]
    assert str(tmp_path) not in json.dumps(known)
    words = [
        "--what",
        rule,
        "--rule",
        str(tmp_path / "rule"),
        "--tasks",
        "digits-mlp",
        "--steps",
        "20",
        "--seeds",
        "2",
    ]
    words += ["--output_dir", str(tmp_path / "runs"), "--tasks_dir", str(tmp_path / "tasks"), "--rank", "2"]
    judged = evaluate_rules.main([*words, "--json", str(tmp_path / "judged.json")])
    (entry,) = judged["tasks"].values()
    assert set(entry["levels"]) == set(entry["runs"]) - {"sl2o", "sl2o_last"}
    ours = next(iter(judged["summary"].values()))["mean_ratios"]
    assert list(ours) == ["sl2o", "sl2o_last"]
    for run in entry["runs"].values():
        assert len(run["eval_per_seed"]) == 2 and run["eval"][-1][0] == 20
    assert entry["runs"]["sl2o"]["learning_rate"] == 1.0 and len(entry["runs"]["sl2o"]["grid"]) == 1
    assert (tmp_path / "judged.png").stat().st_size > 5000
    again = evaluate_rules.main(words)  # from what was kept: seconds are equal too; as text, since NaN is not NaN
    assert json.dumps(again["tasks"]) == json.dumps(judged["tasks"])


def test_unseen_tasks_are_unseen():
    for name, unseen in evaluate_rules.UNSEEN.items():
        provenance = json.loads((evaluate_rules.SHIPPED_RULES / name / "provenance.json").read_text())
        of_plan = dict.fromkeys(task for stage in plans_of.PLANS[name].stages for task in stage.tasks)
        assert provenance["tasks"] == list(of_plan)  # the plan is how the shipped rule was made
        seen = {parse_task(task)[0] for task in provenance["tasks"]}
        assert len(unseen) >= 3 and seen <= set(problems.PROBLEMS) and not seen & set(unseen)
        for tasks in evaluate_rules.SETS.values():
            assert not seen & {parse_task(task)[0] for task in tasks}
    choosing, aside = ({parse_task(task)[0] for task in evaluate_rules.SETS[name]} for name in ("choosing", "aside"))
    assert not choosing & aside


def test_every_problem_learns_something(short):
    data = ("quadratic", "teacher", "digits-mlp", "docs-gpt2", "docs-gru", "code-llama")
    for name in data:
        problem = problems.PROBLEMS[name]("embedded")
        model = problem.build_model()
        again = problem.build_model()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        optimizer = torch.optim.AdamW(model.parameters(), lr=problem.learning_rate)
        first, batches = None, problem.batches("all", 0)
        for _ in range(30):
            optimizer.zero_grad()
            loss = problem.loss(model, next(batches))
            first = float(loss.detach()) if first is None else first
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.95 * first, name


def test_what_is_held_back_is_not_in_the_base(short, tmp_path):
    losses = pretrain_base.main(["--names", "digits-mlp", "--output_dir", str(tmp_path)])
    assert losses["digits-mlp"]["base"] < 0.7 < losses["digits-mlp"]["held-back"]
    problem = problems.PROBLEMS["digits-mlp"]("embedded")
    assert set(next(problem.batches("base", 0))[1].tolist()) <= set(range(7))
    assert set(next(problem.batches("held-back", 0))[1].tolist()) <= {7, 8, 9}
    task = meta_tasks.lora_task("digits-mlp", "embedded", tmp_path, rank=2)
    model = task.build_model()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)


def test_figures_have_a_fifth_of_random_labels():
    problem = problems.PROBLEMS["figures-vit"]("embedded")
    images, labels = next(problem.batches("held-back", 0))
    assert images.shape == (64, 3, 32, 32) and set(labels.tolist()) == {7, 8, 9}
    assert problem.build_model()(images).shape == (64, 10)
    ((_, labels),) = problem.eval_batches("held-back")
    _, known = problems.cached_cifar("embedded", "test", (7, 8, 9))
    wrong = (labels != known[: len(labels)]).float().mean().item()
    assert abs(wrong - 0.2 * 2 / 3) < 0.03  # a random class is the right one in one case of three


def test_studies(short, tmp_path):
    tasks = ["--tasks_dir", str(tmp_path / "tasks")]
    words = ["--unroll_lengths", "5", "10", "--inner_steps", "20", "40", "--meta_epochs", "1", "--test_steps", "30"]
    words += [
        "--seeds",
        "2",
        "--use_cpu",
        "--output_dir",
        str(tmp_path / "unroll"),
        "--json",
        str(tmp_path / "u.json"),
    ]
    unroll = study_unroll.main([*words, *tasks])
    assert [(row["letter"], row["value"]) for row in unroll["rows"]] == [("T", 5), ("T", 10), ("N", 20), ("N", 40)]
    words = ["--tasks", "quadratic", "digits-mlp", "--steps", "20", "--meta_epochs", "1", "--seeds", "1", "--use_cpu"]
    words += ["--output_dir", str(tmp_path / "t"), "--cache", str(tmp_path / "c"), "--json", str(tmp_path / "t.json")]
    transfer = study_transfer.main([*words, *tasks])
    rows = {"meta-trained on quadratic", "meta-trained on digits-mlp", "default", "l2o-dm, this task"}
    for column in transfer["matrix"].values():
        assert rows <= set(column) and "subspace_adamw, tuned" in column
    estimators = study_estimators.main(
        ["--problems", "quadratic", "--steps", "10", "--draws", "5", "--json", str(tmp_path / "e.json")]
    )
    bias = {row["estimator"]: row["bias"] for row in estimators["rows"]}
    assert bias["second-order, T = 10"] < 1e-4 < bias["first-order, T = 5"]
    for name in "ute":
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_study_of_averages(short, tmp_path):
    words = ["--steps", "20", "--seeds", "1", "--output_dir", str(tmp_path / "runs"), "--rules", "default"]
    words += ["--tasks", "quadratic", "--tasks_dir", str(tmp_path / "tasks"), "--json", str(tmp_path / "a.json")]
    found = study_average.main(words)["rules"]["default"]
    assert list(found["mean_over_last"]) == ["0", "1", "4", "9", "24"] and found["mean_over_last"]["0"] == 1
    assert found["mean_over_last"]["1"] != 1 and found["best"] in study_average.ETAS
    assert (tmp_path / "a.png").stat().st_size > 5000
    runs = {"0": {"eval_per_seed": [[[0, 9.0], [10, 2.0], [20, 1.0]]]}}
    runs["4"] = {"eval_per_seed": [[[0, 9.0], [10, 4.0], [20, 2.0]]]}
    assert study_average.over_last(runs, 1) == {"0": pytest.approx(1), "4": pytest.approx(2)}
    runs["4"]["eval_per_seed"][0][2][1] = 0.5
    assert study_average.over_last(runs, 20)["4"] == pytest.approx(0.5)  # from that step on


def test_names_of_tasks(short, tmp_path):
    def scaling(name):
        task = meta_tasks.named_task(name, "embedded", tmp_path)
        (module,) = [m for n, m in task.build_model().named_modules() if n == "base_model.model.0"]
        return task.name, module.r["default"], module.scaling["default"]

    assert scaling("digits-mlp-lora2") == ("digits-mlp-lora2", 2, 2)
    assert scaling("digits-mlp-lora3x0.5") == ("digits-mlp-lora3x0.5", 3, 0.5)
    assert meta_tasks.named_task("quadratic@8", "embedded", tmp_path).name == "quadratic@8"
    # Fewer rows: the first of the same batch. Another name, or its kept runs would pass for those of whole batches.
    whole, few = (meta_tasks.named_task(f"digits-mlp-lora2{at}", "embedded", tmp_path) for at in ("", "@8"))
    for rows, fewer in zip(next(whole.batches(3)), next(few.batches(3)), strict=True):
        assert len(fewer) == 8 < len(rows) and torch.equal(rows[:8], fewer)
    assert few.name == "digits-mlp-lora2@8" != whole.name
    assert all(torch.equal(a, b) for a, b in zip(whole.eval_batches[0], few.eval_batches[0], strict=True))
    for wrong in (
        "nothing",
        "digits-mlp-lora0",
        "digits-mlp-lorax4",
        "digits-mlp-lora4xx",
        "digits-mlp@",
        "digits-mlp@8-lora2",
        "nothing@8",
    ):
        with pytest.raises(ValueError, match=f"there is no task '{wrong}', expected one of quadratic, teacher"):
            meta_tasks.named_task(wrong, "embedded", tmp_path)


def test_transfer_is_summed_up_by_geometric_means_over_the_columns():
    def entry(early, final):
        return {"early_eval_loss": early, "final_eval_loss": final}

    matrix = {"a": {"x": entry(2.0, 1.0), "y": entry(4.0, 1.0)}, "b": {"x": entry(8.0, 0.9), "y": entry(2.0, 0.1)}}
    found = study_transfer.summary(matrix)
    assert found["x"] == {"early_eval_loss": pytest.approx(2.0), "final_eval_loss": pytest.approx(3.0)}
    assert found["y"]["early_eval_loss"] == pytest.approx(2**0.5) and found["y"]["final_eval_loss"] == pytest.approx(
        1.0
    )


def test_study_of_inputs(short, plans, tmp_path):
    words = ["--variants", "plan", "neither", "--seeds", "1", "--output_dir", str(tmp_path)]
    words += ["--judge_on", "quadratic", "--judge_steps", "20", "--runs_dir", str(tmp_path / "runs")]
    result = study_inputs.main([*words, "--json", str(tmp_path / "i.json"), *SMALL])
    assert [row["variant"] for row in result["rows"]] == ["plan", "neither"]
    study_inputs.plot(
        {"rows": [{**row, "judged": []} for row in result["rows"]]}, tmp_path / "scores.png"
    )  # of default-lora
    assert (tmp_path / "scores.png").stat().st_size > 5000
    for row in result["rows"]:
        assert set(row["judged"][0]) == {"subspace_adamw", "subspace_momentum", "subspace_sgd"}
        assert set(row["judged"][0]["subspace_adamw"]) == {"quadratic"}
    assert result["rows"][0]["scores"] != result["rows"][1]["scores"] and (tmp_path / "i.png").is_file()


def test_compare_on_widens_its_grid_and_forgets_no_key(short, tmp_path):
    task = meta_tasks.subspace_task("quadratic", "embedded", tmp_path / "tasks", dim=10)

    def sgd(lr):
        return lambda c: torch.optim.SGD(c, lr=lr)

    cache = tmp_path / "cache"
    runs = compare_on(task, {"sgd": TaskArm(sgd, (1e-4, 3e-4))}, 20, seeds=2, cache=cache)
    rates = [lr for lr, _ in runs["sgd"]["grid"]]
    assert len(rates) > 2 and max(rates) > 3e-4  # the best lay at the edge
    assert runs["sgd"]["final_eval_loss"] == min(mean for _, mean in runs["sgd"]["finalists"])
    longer = compare_on(task, {"sgd": TaskArm(sgd, (1e-4, 3e-4))}, 30, seeds=1, cache=cache)
    assert longer["sgd"]["eval"][-1][0] == 30  # not what was kept of shorter runs


def test_shipped_presets_are_the_published_constants():
    for name in ("paper-cnn", "paper-transformer"):
        rule = Rule.from_pretrained(evaluate_rules.SHIPPED_RULES / name)
        assert rule.config == RuleConfig.preset(name) and isinstance(rule, LSTMRule)
