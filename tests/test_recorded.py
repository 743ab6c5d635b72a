"""Tasks in the subspace of a recorded run of LoRA factors, or of all weights."""

import pytest
import torch

from hf_sl2o import train_on
from hf_sl2o.experiments.tasks.named import check_tasks, full_space_loss, named_task

NAME = "digits-mlp-of-96-lora2@32-pca"


def test_a_task_in_the_subspace_of_a_run_on_another_one(tmp_path):
    task = named_task(NAME, "embedded", tmp_path)
    plain = named_task(NAME.removesuffix("-pca"), "embedded", tmp_path)
    assert task.name == f"{plain.name}-pca" and task.basis.dim == 40 < task.basis.layout.n == plain.basis.dim
    recorded = full_space_loss(NAME, "embedded", tmp_path)
    adamw = lambda c: torch.optim.AdamW(c, lr=0.3, weight_decay=0.0)  # noqa: E731
    (_, start), (_, end) = train_on(task, adamw, 60, evaluate_at=(0, 60))["eval"]
    assert recorded < start / 3 and end < start / 3  # in 60 steps about where the run came in 300
    known = task.basis.fingerprint
    (folder,) = tmp_path.glob("*-pca-*")
    made = (folder / "basis" / "model.safetensors").stat().st_mtime_ns
    again = named_task(NAME, "embedded", tmp_path)
    assert again.basis.fingerprint == known
    assert (folder / "basis" / "model.safetensors").stat().st_mtime_ns == made  # kept, not made again
    (folder / "basis" / "model.safetensors").unlink()
    assert named_task(NAME, "embedded", tmp_path).basis.fingerprint == known  # lost: made anew


@pytest.mark.parametrize(
    "name, message",
    [
        ("digits-mlp-pca", "-pca stands after these"),
        ("digits-mlp-lora2-pca-pca", "there is no task"),
        ("nothing-lora2-pca", "there is no task"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        check_tasks([name], "embedded", plain=True)


def test_it_is_no_task_of_raw_tensors():
    with pytest.raises(ValueError, match="-pca stands after these"):
        check_tasks([NAME], "embedded")
