"""hf_sl2o/training/resume.py: a checkpoint that was half-written or half-deleted is never taken for a complete one."""

import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_sl2o.training import trainer
from hf_sl2o.training.resume import NOTE, CheckpointCallback, first_fault, last_complete_checkpoint, steps_done

from .conftest import Tokens, tiny_gpt2

# Without these a run goes on to the same numbers; only a note can tell that they are gone.
FURTHER = {"config.json", "generation_config.json", NOTE}


def train(folder, model=None, *, noted=True, **options):
    args = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=8, report_to="none", use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    callbacks = [CheckpointCallback()] if noted else []
    Trainer(model or tiny_gpt2(), args, train_dataset=Tokens(16), callbacks=callbacks).train()
    return folder


def adapters():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model.add_adapter("second", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    return model


@pytest.fixture(scope="module", params=["model", "model alone", "adapters", "without a note", "alone without a note"])
def run(request, tmp_path_factory):
    """Two checkpoints, and whether they have a note."""
    noted = "without" not in request.param
    options = {"save_only_model": True} if "alone" in request.param else {}
    model = adapters() if request.param == "adapters" else None
    return train(tmp_path_factory.mktemp("run"), model, noted=noted, **options), noted


def test_each_file_is_missed(run, tmp_path, caplog):
    folder, noted = run
    shutil.copytree(folder, tmp_path / "run")
    last = tmp_path / "run" / "checkpoint-4"
    assert last_complete_checkpoint(tmp_path / "run") == str(last) and steps_done(last) == 4
    names = [path.relative_to(last) for path in last.rglob("*") if path.is_file() and path.name != "README.md"]
    assert (NOTE in map(str, names)) == noted and len(names) > 4
    for name in names:
        content = (last / name).read_bytes()
        spared = name.name == NOTE or (not noted and name.name in FURTHER)
        for cut in (None, 0, len(content) // 2, len(content) - 2):
            if cut is None:
                (last / name).unlink()
            else:
                (last / name).write_bytes(content[:cut])
            with caplog.at_level(logging.WARNING):
                found = last_complete_checkpoint(tmp_path / "run")
            if not spared:
                assert found == str(tmp_path / "run" / "checkpoint-2"), (name, cut)
                assert "checkpoint-4 is not complete and is left out" in caplog.text
            caplog.clear()
        (last / name).write_bytes(content)
    assert last_complete_checkpoint(tmp_path / "run") == str(last)


def test_no_two_files_less_make_a_checkpoint_of_the_model_alone(tmp_path):
    """Where optimizer, schedule and random numbers are all gone the arguments tell."""
    folder = train(tmp_path / "run", noted=False)
    last = folder / "checkpoint-4"
    states = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    for number in (1, 2, 3):
        for gone in itertools.combinations(states, number):
            contents = {name: (last / name).read_bytes() for name in gone}
            for name in gone:
                (last / name).unlink()
            assert "is gone" in first_fault(last)
            for name, content in contents.items():
                (last / name).write_bytes(content)
    assert first_fault(last) is None


def test_pieces_of_a_large_model_and_random_numbers_of_many_processes(tmp_path):
    last = train(tmp_path / "run", noted=False) / "checkpoint-4"
    tiny_gpt2().save_pretrained(last, max_shard_size="10KB")
    (last / "model.safetensors").unlink(missing_ok=True)
    pieces = sorted(last.glob("model-*.safetensors"))
    assert len(pieces) > 1 and first_fault(last) is None
    for path in (*pieces, last / "model.safetensors.index.json"):
        path.rename(tmp_path / "away")
        assert first_fault(last) is not None
        (tmp_path / "away").rename(path)
    for index in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'):
        (last / "model.safetensors.index.json").write_text(index)
        assert "names no files" in first_fault(last)
    shutil.rmtree(last)
    last = train(tmp_path / "run", noted=False) / "checkpoint-4"
    for rank in range(3):
        shutil.copy(last / "rng_state.pth", last / f"rng_state_{rank}.pth")
    (last / "rng_state.pth").unlink()
    assert first_fault(last) is None
    (last / "rng_state_1.pth").unlink()
    assert first_fault(last) == "rng_state_1.pth is gone"


def test_a_state_that_does_not_say_where_it_is(tmp_path):
    last = train(tmp_path / "run", noted=False) / "checkpoint-4"
    wrong = ['"4"', "null", "true", "-1", "2.5", "[4]"]
    for state in ("", "{", "[]", "3", "{}", *(f'{{"global_step": {value}}}' for value in wrong)):
        (last / "trainer_state.json").write_text(state)
        with pytest.raises(ValueError, match="trainer_state.json"):
            steps_done(last)
        assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")


def test_a_damaged_note_is_no_proof(tmp_path):
    last = train(tmp_path / "run") / "checkpoint-4"
    assert set(json.loads((last / NOTE).read_text())["files"]) >= {"optimizer.pt", "model.safetensors", "config.json"}
    for note in ("", "[]", '{"files": []}', '{"files": {"config.json": "x"}}', '{"files": 3}'):
        (last / NOTE).write_text(note)
        assert NOTE in first_fault(last)


def test_other_folders_are_no_checkpoints(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-²", "checkpoint-4", "checkpoint-5"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    assert trainer.last_complete_checkpoint is last_complete_checkpoint and trainer.steps_done is steps_done


def test_nothing_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    last = train(tmp_path / "run", noted=False) / "checkpoint-4"
    for name in ("training_args.bin", "optimizer.pt"):
        torch.save({"save_only_model": Trap()}, last / name)
    assert first_fault(last) is None and not (tmp_path / "executed").exists()
