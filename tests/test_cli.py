"""The command `hf-sl2o`: what it prints for people and as JSON, exit codes, and bad input in one sentence."""

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from transformers import GPT2Config, ResNetConfig, T5Config, ViTConfig

import hf_sl2o_command
from hf_sl2o import cli
from hf_sl2o.experiments.planning import ALL_STORAGES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
TINY = {"vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16}


@pytest.fixture
def tiny(tmp_path):
    GPT2Config(**TINY).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def printed(capsys, *words):
    """Exit code, and what went to the two outputs."""
    try:
        code = cli.main(list(words))
    except SystemExit as error:
        code = error.code
    out = capsys.readouterr()
    return code, out.out, out.err


def as_json(capsys, *words):
    code, out, err = printed(capsys, "plan", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_table_of_7b_is_read_on_100_columns(capsys):
    code, text, _ = printed(capsys, "plan", "--model", "llama-7b")
    lines = text.splitlines()
    assert code == 0 and max(map(len, lines)) <= 100
    assert lines[0] == "llama-7b: 6,738,415,616 numbers in bf16, 4,096 tokens a rank and step."
    for heading in ("1 h100", "8 h100 DDP", "8 h100 FSDP2", "64 h100 DDP", "64 h100 FSDP2"):
        at = next(index for index, line in enumerate(lines) if line.startswith(f"{heading} "))
        names = [line[:16].strip() for line in lines[at + 1 : at + 3 + len(ALL_STORAGES)]]
        assert names == ["AdamW", "LoRA + AdamW", *(f"SL2O {storage}" for storage in ALL_STORAGES)]
    assert "Not counted: activations" in text


def test_json_has_every_row_in_bytes(capsys):
    facts = as_json(capsys, "--model", "llama-7b")
    assert facts["n"] == 6_738_415_616 and len(facts["rows"]) == 5 * (2 + 2 * len(ALL_STORAGES))
    adamw = next(row for row in facts["rows"] if row["method"] == "AdamW")
    n = facts["n"]
    assert adamw["weights"] == pytest.approx(2 * n, rel=1e-6) and adamw["gradients"] == 2 * n
    assert adamw["state"] == pytest.approx(12 * n, rel=1e-6) and not adamw["fits"]
    dense = next(row for row in facts["rows"] if row["storage"] == "fp32" and row["streamed"])
    assert dense["basis"] == 40 * 4 * n == facts["basis_bytes"]["fp32"]
    sent = {row["wire"] for row in facts["rows"] if row["streamed"] and (row["spread"], row["gpus"]) == ("DDP", 8)}
    assert sent == {2 * 7 * 160 // 8}
    assert facts["basis_bytes"]["tucker"] < 0.05 * dense["basis"]


@pytest.mark.parametrize(
    ("name", "n"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-xl", 1_557_611_200)]
)
def test_built_in_shapes_have_the_known_sizes(capsys, name, n):
    facts = as_json(capsys, "--model", name, "--gpus", "1", "--storage", "random")
    assert facts["n"] == n and len(facts["rows"]) == 4


def test_a_configuration_is_a_file_or_its_folder(capsys, tiny):
    whole = as_json(capsys, "--config", tiny, "--dim", "4")
    of_file = as_json(capsys, "--config", f"{tiny}/config.json", "--dim", "4")
    assert whole["rows"] == of_file["rows"] and whole["n"] == 50 * 32 + 16 * 32 + 2 * 12 * 32**2 + 2 * 13 * 32 + 2 * 32
    other = as_json(capsys, "--config", tiny, "--dim", "4", "--dtype", "fp32")
    assert other["rows"] != whole["rows"]
    first, second = other["rows"][0], whole["rows"][0]
    assert first["state"] - second["state"] == -4 * whole["n"]  # no fp32 copy


def test_lora_is_what_moves(capsys, tiny):
    facts = as_json(capsys, "--config", tiny, "--dim", "4", "--lora", "2", "--gpus", "1")
    moved = 2 * 2 * (32 + 96)  # of c_attn in each of two layers
    assert facts["moved_by_sl2o"] == moved
    rows = facts["rows"]
    assert next(row for row in rows if row["storage"] == "fp32")["basis"] == 4 * 4 * moved
    lora = next(row for row in rows if row["method"] == "LoRA + AdamW")
    assert lora["state"] == 8 * moved + 4 * 4  # peft keeps factors in fp32


def test_image_classifiers(capsys, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTConfig(**sizes, image_size=16, patch_size=8).save_pretrained(tmp_path / "vit")
    facts = as_json(capsys, "--config", str(tmp_path / "vit"), "--dim", "4")
    assert "LoRA + AdamW" not in {row["method"] for row in facts["rows"]}
    assert "peft has no default modules" in facts["notes"][0]
    code, _, err = printed(capsys, "plan", "--config", str(tmp_path / "vit"), "--lora", "2")
    assert code == 2 and "peft has no default target modules" in err
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetConfig(**sizes).save_pretrained(tmp_path / "resnet")
    assert "Convolutions" in as_json(capsys, "--config", str(tmp_path / "resnet"), "--dim", "4")["notes"][-1]
    assert "Convolutions" not in as_json(capsys, "--model", "gpt2")["notes"][-1]


def test_numbers_of_the_device_can_be_given(capsys, tiny):
    words = ("--config", tiny, "--dim", "4", "--gpus", "1", "16", "--device", "cpu")
    plain = as_json(capsys, *words)["rows"]
    given = as_json(
        capsys, *words, "--flops", "114.688", "--bandwidth", "30.72", "--memory", "1e-6", "--link", "5"
    )["rows"]  # fmt: skip
    assert all(row["fits"] for row in plain) and not any(row["fits"] for row in given)
    for before, after in zip(plain, given, strict=True):
        if before["storage"] != "random":
            assert after["seconds"]["optimizer"] == pytest.approx(10 * before["seconds"]["optimizer"])
        assert after["seconds"]["wire"] == pytest.approx(10 * before["seconds"]["wire"])
        assert after["seconds"]["compute"] == pytest.approx(2 * before["seconds"]["compute"])


def test_the_sentences_on_top_name_what_is_fastest(capsys, tiny):
    facts = as_json(capsys, "--config", tiny, "--dim", "4", "--gpus", "1")
    rivals = [row for row in facts["rows"] if row["fits"] and "LoRA" not in row["method"]]
    best = min(rivals, key=lambda row: row["step_s"])
    assert re.search(rf"fastest that fits and trains all weights is {best['method']}\b", facts["summary"][0])
    nothing = as_json(capsys, "--config", tiny, "--dim", "4", "--gpus", "1", "--memory", "1e-6")["summary"][0]
    assert nothing.startswith("On 1 h100 nothing fits 1.00 kB and trains all weights.")
    # just below the least total: without its average it fits
    tight = min(row["total"] for row in rivals) - 1
    light = as_json(capsys, "--config", tiny, "--dim", "4", "--gpus", "1", "--memory", f"{tight / 1e9!r}")
    assert re.search(
        r"Without its average \(sl2o_average=0\) SL2O \w+ with streamed gradients fits: ", light["summary"][0]
    )
    assert "Without" not in facts["summary"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gpt2-xxl"], "--model is 'gpt2-xxl', expected one of gpt2, .*; did you mean 'gpt2-xl'?"),
        (["--config", "/none/config.json"], "there is no such file; give a config.json, its folder, or a Hub id"),
        (["--config", "{folder}"], "the folder has no config.json"),
        (["--config", "{folder}/text.json"], "expected a model's configuration, and found"),
        (["--config", "{folder}/list.json"], "expected a model's configuration, and found"),
        (["--config", "{folder}/unknown.json"], "expected a model's configuration, and found"),
        (["--config", "{folder}/broken.json"], "no model can be made of this GPT2Config"),
        (
            ["--config", "{folder}/word.json"],
            "and found: Validation error for field 'n_embd': .* expected int, got str",
        ),
        (["--config", "{folder}/activation.json"], "no model can be made of this GPT2Config: 'zz' is unknown"),
        (["--config", "{folder}/t5"], "the configuration is a T5Config, expected that of a causal language model"),
        (["--config", "no-such/model"], "expected a model's configuration, and found"),
        (["--model", "gpt2", "--dim", "200000000"], "--dim is 200000000, expected an integer from 1 to 124439808"),
        (["--model", "gpt2", "--dim", "0"], "--dim is 0"),
        (["--model", "gpt2", "--dim", "100000000"], "streamed gradients need one that holds dim"),
        (["--model", "gpt2", "--gpus", "8", "0"], "--gpus is 0, expected an integer from 1"),
        (["--model", "gpt2", "--batch-tokens", "0"], "--batch-tokens is 0"),
        (["--model", "gpt2", "--lora", "0"], "--lora is 0"),
        (["--model", "gpt2", "--bandwidth", "-3"], "--bandwidth is -3.0, expected a finite number above 0"),
        (["--model", "gpt2", "--memory", "nan"], "--memory is nan"),
        (["--model", "gpt2", "--storage", "int2"], "--storage is 'int2', expected one of fp32, .* 'int[48]'?"),
        (["--model", "gpt2", "--device", "h10"], "--device is 'h10', expected one of .*; did you mean 'h100'?"),
        (["--model", "gpt2", "--dtype", "fp8"], "--dtype is 'fp8', expected one of bf16, fp32"),
    ],
)
def test_bad_input_is_said_in_one_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text.json").write_text("not json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"model_type": "nothing-such"}')
    (tmp_path / "broken.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 30, "n_head": 7}))
    (tmp_path / "word.json").write_text('{"model_type": "gpt2", "n_embd": "wide"}')
    (tmp_path / "activation.json").write_text('{"model_type": "gpt2", "n_layer": 1, "activation_function": "zz"}')
    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    code, out, err = printed(capsys, "plan", *(word.format(folder=tmp_path) for word in words))
    assert code == 2 and not out
    assert re.search(said, err) and err.startswith("hf-sl2o: ") and err.count("\n") == 1


@pytest.fixture
def command(monkeypatch):
    """Adds the command `other`, whose function is the one that is given."""

    def add(run, add_arguments=lambda parser: None):
        module = types.ModuleType("hf_sl2o.commands.other", "Does something else.")
        module.run, module.add_arguments = run, add_arguments
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "other", "does something else")

    return add


def test_exit_codes(capsys, command):
    code, out, err = printed(capsys, "plam")
    assert code == 2 and not out and "the command is 'plam', expected one of extract" in err
    assert err.endswith("; did you mean 'plan'?\n") and printed(capsys)[0] == 2
    for words in (["--help"], ["plan", "--help"]):
        code, out, _ = printed(capsys, *words)
        assert code == 0 and "usage: hf-sl2o" in out
    failures = (OSError("disk"), BrokenPipeError("wire"), FloatingPointError("inf"), MemoryError("full"))
    for raised, expected in (*((error, 1) for error in failures), (ImportError("none"), 1), (ValueError("bad"), 2)):

        def fails(arguments, raised=raised):
            raise raised

        command(fails)
        code, out, err = printed(capsys, "other")
        assert code == expected and not out and str(raised) in err and err.count("\n") == 1

    def interrupted(arguments):
        raise KeyboardInterrupt

    command(interrupted)
    assert printed(capsys, "other") == (130, "", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--modell", "gpt2"], "an option of hf-sl2o plan is '--modell', expected .*; did you mean '--model'?"),
        (["--model", "gpt2", "--gpu=4"], "did you mean '--gpus'?"),
        (["--model", "gpt2", "--xyzzy"], "an option of hf-sl2o plan is '--xyzzy', expected one of "),
        ([], "one of the arguments --model --config is required; see hf-sl2o plan --help"),
        (["--model", "gpt2", "--dim", "many"], "argument --dim: invalid int value: 'many'; see hf-sl2o plan --help"),
        (["--model", "gpt2", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_a_mistyped_option_is_answered_in_one_line(capsys, words, said):
    code, out, err = printed(capsys, "plan", *words)
    assert code == 2 and not out and re.search(said, err) and err.count("\n") == 1


def test_a_further_command_is_two_functions(capsys, command):
    def doubles(given):
        print("on the way")
        return {"x": 2 * given.x, "y": [float("nan")]}, f"{2 * given.x}!"

    command(doubles, lambda parser: parser.add_argument("x", type=int))
    assert printed(capsys, "other", "4") == (0, "8!\n", "on the way\n")
    assert json.loads(printed(capsys, "other", "4", "--json")[1]) == {"x": 8, "y": [None]}
    assert "  other       does something else\n" in printed(capsys, "--help")[1]
    assert "Does something else." in printed(capsys, "other", "--help")[1]


def test_the_examples_of_the_entry_run():
    text = re.sub(r" *```.*\n", "", hf_sl2o_command.known.__doc__)
    found = doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(text, {}, "known", None, 0))
    assert (found.attempted, found.failed) == (2, 0)


def test_every_command_has_a_help_with_an_example(capsys):
    modules = {path.stem for path in (ROOT / "hf_sl2o" / "commands").glob("*.py")}
    for name in cli.COMMANDS:
        assert name.replace("-", "_") in modules
        code, text, _ = printed(capsys, name, "--help")
        assert code == 0 and re.search(rf"^    hf-sl2o {name} [\w-]", text, flags=re.MULTILINE), name
        assert "--json" in text and max(map(len, text.splitlines())) <= 119
        options = [line for line in text.splitlines() if re.match(r"  --\S+( \S+)?$", line)]
        assert all(text.splitlines()[text.splitlines().index(line) + 1].startswith("   ") for line in options)


def test_the_help_needs_no_torch(tmp_path):
    def loaded(code):
        words = [sys.executable, "-X", "importtime", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
        out = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return {line.rpartition("|")[2].strip() for line in out.stderr.splitlines() if "|" in line}, out

    for words in (["--help"], [], ["plam"]):
        names, out = loaded(f"import hf_sl2o_command as c; sys.exit(c.main({words}))")
        assert out.returncode == (0 if words == ["--help"] else 2)
        assert "hf_sl2o_command" in names and not {"torch", "transformers", "numpy", "hf_sl2o"} & names
    assert "torch" in loaded("import hf_sl2o.cli")[0]  # a break is seen


WORDS = (["--help"], ["plan", "--help"], ["plan", "--model", "gpt2", "--gpus", "1"])


def code_of(words):
    try:
        return cli.main(words)
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_reader_that_has_had_enough_is_no_error(capsys, monkeypatch, words):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert code_of(words) == 0
    assert not capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_full_disk_is_said_in_one_line(capsys, monkeypatch, words):
    with open("/dev/full", "w", encoding="utf-8") as full:  # what is left in its buffer is not tried again
        monkeypatch.setattr("sys.stdout", full)
        assert code_of(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("hf-sl2o") and "failed: [Errno 28]" in err and err.count("\n") == 1


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_prints_what_it_says(capsys):
    table, from_python = blocks("text")
    first, second = (shlex.split(block) for block in blocks("bash"))
    assert first[0] == second[0] == "hf-sl2o"
    assert printed(capsys, *first[1:]) == (0, table, "")
    assert printed(capsys, *second[1:])[0] == 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks("python"):
            exec(block, {})
    assert out.getvalue() == from_python
