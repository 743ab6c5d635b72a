"""The list of the supplement's tables and figures: its commands are real, its verdicts follow the files."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from hf_sl2o.experiments import supplement
from hf_sl2o.experiments.supplement import ENTRIES, NOT, NOT_ATTEMPTED, REPRODUCED, SMALL
from recipes import reproduce

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "recipes" / "results"


def results_of(entry):
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in entry.files}


def test_every_table_and_figure_of_the_supplement_is_in_the_list():
    named = " ".join(entry.name for entry in ENTRIES)
    figures = {int(n) for n in re.findall(r"figures? (\d)", named)} | {5}  # "figures 4 and 5"
    assert figures == set(range(1, 8)) and "4 and 5" in named
    assert all(f"table {n}" in named for n in range(1, 5))
    assert sum(entry.minutes for entry in ENTRIES) <= 2 * 240  # four hours of two cores


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.files], ids=lambda entry: entry.name)
def test_its_commands_are_of_scripts_that_are_there(entry, tmp_path):
    options = type("O", (), {"data": "embedded", "results": tmp_path, "output_dir": tmp_path / "out"})
    for name, command in entry.files.items():
        words = reproduce.words_of(command, name, options)
        assert (ROOT / words[1]).is_file() and not any("{" in word for word in words)
        source = (ROOT / words[1]).read_text()
        assert "--data" not in words or "data" in source
        assert str(tmp_path) in shlex.join(words)


def settings_of(command):
    """The flags of a command with their values, as text."""
    found, name = {}, None
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = []
        else:
            found[name].append(word)
    return found


@pytest.mark.parametrize("name", ["figure 1", "figure 2", "figure 3"])
def test_the_file_is_what_the_command_makes(name):
    (entry,) = [entry for entry in ENTRIES if entry.name == name]
    for file, command in entry.files.items():
        result = json.loads((RESULTS / f"{file}.json").read_text())
        asked, known = settings_of(command), {**result["training"], **result["recipe"]}
        assert set(asked.pop("arms", [])) <= set(result["runs"])  # arms are tuned each for itself
        for flag, values in asked.items():
            if flag in known and flag != "data":
                given = known[flag] if isinstance(known[flag], list) else [known[flag]]
                assert [str(value) for value in given] == values, flag
        assert known["quick_grid"] == ("quick_grid" in asked) and known["seeds"] == int(asked.get("seeds", [3])[0])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_verdict_is_one_of_four_and_follows_the_file(entry):
    if any(not (RESULTS / f"{name}.json").is_file() for name in entry.files):
        assert reproduce.verdict_of(entry, RESULTS)[0] == "not run yet"
        return
    word, text = entry.verdict(results_of(entry))
    assert word in (REPRODUCED, SMALL, NOT, NOT_ATTEMPTED) and text
    assert (word, text) == reproduce.verdict_of(entry, RESULTS)


def test_other_numbers_change_the_verdict():
    by_name = {entry.name: entry for entry in ENTRIES}
    figure_2 = results_of(by_name["figure 2"])
    assert supplement.figure_2(figure_2)[0] == SMALL
    for point in figure_2["gpt2_e2e"]["runs"]["sl2o"]["eval"]:
        point[1] += 1.0
    assert supplement.figure_2(figure_2)[0] == NOT
    transfer = results_of(by_name["table 3"])
    assert supplement.table_3(transfer)[0] == SMALL and supplement.section_2_7(transfer)[0] == SMALL
    transfer["study_transfer"]["summary"]["l2o-dm, this task"]["final_eval_loss"] = 1.0
    assert supplement.section_2_7(transfer)[0] == NOT
    rows = [{"from": "paper", "complexity": 9, "pearson_r_test": 0.9}]
    rows += [{"from": "found", "complexity": n, "pearson_r_test": r} for n, r in ((7, 0.96), (12, 0.99))]
    symbolic = {"study_symbolic": {"table": rows, "ceilings": {"m~ and g~": {"pearson_r": 0.97}}}}
    assert supplement.table_2(symbolic)[0] == SMALL and "0.960" in supplement.table_2(symbolic)[1]
    rows[1]["pearson_r_test"] = 0.95
    assert supplement.table_2(symbolic)[0] == NOT  # the one of 12 is longer than the paper's


def test_a_lead_within_the_seeds_is_no_lead():
    def runs(loss, accuracy):
        return {
            "resnet8_cifar": {
                "runs": {
                    arm: {
                        "eval_per_seed": [[[0, 2.3], [60, value + jitter], [75, 9.0]] for jitter in (-0.01, 0, 0.01)],
                        "test_accuracy_per_seed": [share + jitter for jitter in (-0.002, 0, 0.002)],
                    }
                    for arm, value, share in (
                        ("sl2o", loss, accuracy), ("subspace_momentum", 1.0, 0.64), ("momentum", 1.6, 0.63),
                    )
                }
            }
        }  # fmt: skip

    word, text = supplement.figure_1(runs(0.98, 0.65))
    assert word == SMALL and "+0.020, seeds ± 0.010" in text and "+1.0 points, seeds ± 0.2" in text
    assert supplement.figure_1(runs(0.995, 0.65))[0] == NOT  # 0.005 lower, and the seeds differ by 0.010
    assert supplement.figure_1(runs(0.98, 0.641))[0] == NOT
    word, text = supplement.figure_1(runs(1.2, 0.62))
    assert word == NOT and "`subspace_momentum` (1.000" in text and "-2.0 points" in text


def test_what_is_there_is_not_run_again_and_the_page_is_written(tmp_path, monkeypatch, capsys):
    script = tmp_path / "work.py"
    script.write_text(
        "import sys, pathlib, json\n"
        "out = pathlib.Path(sys.argv[2]); out.mkdir(parents=True)\n"
        "(out / 'comparison.json').write_text(json.dumps({'value': 3}))\n"
    )
    entry = dataclasses.replace(
        ENTRIES[1],
        files={"made": f"python {script} --out {{out}}"},
        verdict=lambda r: (SMALL, f"{r['made']['value']}"),
    )
    monkeypatch.setattr(reproduce, "ENTRIES", (entry,))
    words = ["--results", str(tmp_path / "results"), "--output_dir", str(tmp_path / "out")]
    assert reproduce.main([*words, "--list"]) == {"figure 1": "not run yet"}
    assert not (tmp_path / "results").exists()
    assert reproduce.main(words) == {"figure 1": SMALL}
    page = (tmp_path / "results" / "REPRODUCTION.md").read_text()
    assert "| figure 1 |" in page and SMALL in page and "made.json" in page and f"about {entry.minutes}" not in page
    known = json.loads((tmp_path / "results" / "reproduce_minutes.json").read_text())
    assert 0 < known["minutes"]["made"] < 1 and known["environment"]["commit"]
    script.write_text("raise SystemExit(1)")  # it is not run again
    assert reproduce.main(words) == {"figure 1": SMALL}
    assert "made.json is there" in capsys.readouterr().out
    (tmp_path / "results" / "made.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="is of another version of its command"):
        reproduce.main(words)
    shutil.rmtree(tmp_path / "results")
    with pytest.raises(RuntimeError, match="failed with exit code 1"):
        reproduce.main(words)


def test_commands_run_side_by_side_and_one_that_fails_leaves_the_others(tmp_path, monkeypatch):
    script = tmp_path / "work.py"  # each waits for the other: alone it would not end
    script.write_text(
        "import sys, pathlib, time\n"
        "out, other = map(pathlib.Path, sys.argv[1:])\n"
        "out.mkdir(parents=True)\n"
        "end = time.time() + 20\n"
        "while not other.is_dir():\n"
        "    assert time.time() < end\n"
        "    time.sleep(0.01)\n"
        "(out / 'comparison.json').write_text('{}')\n"
    )
    files = {"a": f"python {script} {{out}} {tmp_path}/out/b", "b": f"python {script} {{out}} {tmp_path}/out/a"}
    bad = dataclasses.replace(ENTRIES[1], files={"c": f"python {script}"}, verdict=lambda r: (SMALL, "c"))
    good = dataclasses.replace(ENTRIES[2], files=files, verdict=lambda r: (SMALL, "both"))
    monkeypatch.setattr(reproduce, "ENTRIES", (bad, good))
    words = ["--results", str(tmp_path / "results"), "--output_dir", str(tmp_path / "out"), "--processes"]
    with pytest.raises(RuntimeError, match="figure 1: its command failed with exit code 1; start again to go on"):
        reproduce.main([*words, "3"])
    assert {path.name for path in (tmp_path / "results").glob("?.json")} == {"a.json", "b.json"}
    assert reproduce.main([*words, "1", "--only", "figure 2"]) == {"figure 2": SMALL}
    with pytest.raises(ValueError, match="--processes"):
        reproduce.main([*words, "0"])


def test_minutes_are_those_of_all_starts_and_of_a_file_once(tmp_path):
    by_name = {entry.name: entry for entry in ENTRIES}
    both, symbolic = by_name["figures 4 and 5"], by_name["table 2"]
    assert reproduce.minutes_of(symbolic, tmp_path) == f"about {symbolic.minutes}"
    reproduce.took(tmp_path, "study_symbolic", 20.0)
    reproduce.took(tmp_path, "study_symbolic", 3.4)
    reproduce.took(tmp_path, "study_directions", 9.0)
    assert reproduce.minutes_of(symbolic, tmp_path) == "23"
    assert reproduce.minutes_of(both, tmp_path) == "9"  # its other file is counted above
    assert reproduce.minutes_of(by_name["figure 7"], tmp_path) == "0"
    assert reproduce.minutes_of(by_name["figure 6, table 4"], tmp_path).startswith("about")


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="--only has 'figure 9', expected some of table 1, figure 1"):
        reproduce.main(["--only", "figure 9", "--list"])


def test_the_papers_size_is_printed_and_not_run(capsys):
    assert reproduce.main(["--size", "paper"]) == {}
    assert "recipes/vit_imagenet.py" in capsys.readouterr().out
