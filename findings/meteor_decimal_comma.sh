#!/usr/bin/env bash
# pycocoevalcap 1.2 (METEOR 1.5), Java 8 or newer, Python 3.10 or newer. Downloads 100 MB.
# Expected: METEOR gives the same score whatever the language of the machine is.
# Happens: where numbers have a decimal comma, as in German, it ends with InputMismatchException: it writes the counts of
#   a sentence with points, and reads them back with commas. pycocoevalcap then fails to read a score.
# What to do: start it with -Duser.language=en.
set -euo pipefail

command -v java > /dev/null || { echo "needs the command java"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-deps pycocoevalcap==1.2
meteor=$(venv/bin/python -c 'import pathlib, pycocoevalcap; print(pathlib.Path(pycocoevalcap.__path__[0]) / "meteor")')

cat > two_steps.py <<'PY'
"""As pycocoevalcap does: the counts of a sentence are asked for, and handed back to be scored."""
import subprocess
import sys

words = ["java", f"-Duser.language={sys.argv[2]}", "-Xmx2G", "-jar", f"{sys.argv[1]}/meteor-1.5.jar", "-", "-"]
words += ["-stdio", "-l", "en", "-norm"]
program = subprocess.Popen(words, -1, cwd=sys.argv[1], stdin=-1, stdout=-1, stderr=-1, text=True)
program.stdin.write("SCORE ||| a blue spoon near the city centre ||| a blue spoon in the city\n")
program.stdin.flush()
counts = program.stdout.readline().strip()
answer, errors = program.communicate(f"EVAL ||| {counts}\n")
said = [line for line in errors.splitlines() if "InputMismatchException" in line]
print(said[0].split()[-1] if said else answer.split()[0])
PY

english=$(venv/bin/python two_steps.py "$meteor" en)
german=$(venv/bin/python two_steps.py "$meteor" de)
echo "en: $english"
echo "de: $german"
[[ "$english" == 0.* && "$german" == *"InputMismatchException"* ]] || { echo "this has changed"; exit 1; }
