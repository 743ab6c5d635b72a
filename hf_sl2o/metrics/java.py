"""Stanford's tokenizer and METEOR 1.5: Java programs that pycocoevalcap brings (`pip install hf-sl2o[e2e]`).

Nothing is written into the folder of that package. Both read and write UTF-8 and decimal points, in whatever language
the machine is.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .words import kept_words, one_line

_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR, _PARAPHRASES = "meteor/meteor-1.5.jar", "meteor/data/paraphrase-en.gz"
_SETTINGS = (
    "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Dsun.jnu.encoding=UTF-8", "-Duser.language=en",
    "-Duser.country=US",
)  # fmt: skip


def missing() -> str | None:
    """Says what of Java and its programs is not there, or does not run; None if all is."""
    if (command := shutil.which("java")) is None:
        return "there is no command java; install a Java runtime, 8 or later"
    try:
        folder = _folder()
    except ModuleNotFoundError:
        return "the package pycocoevalcap is not installed; pip install 'hf-sl2o[e2e]'"
    for name in (_TOKENIZER, _METEOR, _PARAPHRASES):
        if not (folder / name).is_file():
            return f"pycocoevalcap lacks {name}; install version 1.2 again"
    if (fault := _fault(command)) is not None:
        return f"the command java does not run: {fault}; install a Java runtime, 8 or later"
    return None


def stanford_words(texts: Sequence[str]) -> list[list[str]]:
    """Returns the words of each sentence as the official scorer takes them: in lower case, without punctuation.

    Args:
        texts (`Sequence[str]`): Sentences.

    Raises:
        `RuntimeError`: Java or its program is not there, or failed.
    """
    _check()
    command = ["java", *_SETTINGS, "-cp", str(_folder() / _TOKENIZER), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = [one_line(text) for text in texts]
    ran = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input="".join(f"{line}\n" for line in lines).encode(),
        capture_output=True,
    )  # fmt: skip
    found = ran.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if ran.returncode or len(found) != len(lines):
        _failed("the PTBTokenizer", f"{len(found)} lines for {len(lines)} sentences", ran.stderr)
    return [kept_words(line.split()) for line in found]


def meteor_of_words(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """METEOR 1.5 of sentences that were cut into words, from 0 to 1.

    Raises:
        `RuntimeError`: Java or its program is not there, or failed.
    """
    _check()
    jar = _folder() / _METEOR
    command = ["java", *_SETTINGS, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        program = subprocess.Popen(
            command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        try:
            assert program.stdin is not None and program.stdout is not None

            def ask(line: str, answers: int = 1) -> str:
                program.stdin.write(f"{line}\n")  # type: ignore[union-attr]
                program.stdin.flush()  # type: ignore[union-attr]
                return [program.stdout.readline() for _ in range(answers)][-1].strip()  # type: ignore[union-attr]

            rows = [[*map(_words_of_meteor, of), _words_of_meteor(prediction)]
                    for prediction, of in zip(predictions, references, strict=True)]  # fmt: skip
            statistics = [ask(" ||| ".join(["SCORE", *row])) for row in rows]
            # One score a sentence, and then that of all of them.
            return float(ask(" ||| ".join(["EVAL", *statistics]), answers=len(rows) + 1))
        except (OSError, ValueError):
            errors.seek(0)
            _failed("METEOR", "no score", errors.read())
        finally:
            program.kill()
            program.wait()
            for stream in (program.stdin, program.stdout):
                if stream is not None:
                    _close(stream)


def _words_of_meteor(words: Sequence[str]) -> str:
    """A sentence as METEOR reads it: "|||" stands between sentences, so it is no word."""
    return " ".join(word.replace("|||", "") for word in words)


def _close(stream: object) -> None:
    try:
        stream.close()  # type: ignore[attr-defined]
    except OSError:  # what was not read by a program that has ended
        pass


def _folder() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'pycocoevalcap'")
    return Path(list(spec.submodule_search_locations)[0])


@functools.cache
def _fault(command: str) -> str | None:
    """What a command says that is no Java: macOS has one that does nothing but ask for it. None if it runs."""
    try:
        ran = subprocess.run([command, "-version"], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        return str(error)
    return None if ran.returncode == 0 else _last(ran.stderr)


def _check() -> None:
    if (lacks := missing()) is not None:
        raise RuntimeError(f"the official tokenizer and METEOR need Java: {lacks}")


def _last(errors: bytes) -> str:
    """The last line that says something: neither a frame of a trace, nor which settings were found."""
    lines = [line for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line.strip() for line in lines if not line.startswith(("\t", "Picked up "))]
    return said[-1].rstrip(".") if said else "it says nothing"


def _failed(program: str, what: str, errors: bytes) -> NoReturn:
    raise RuntimeError(f"{program} of pycocoevalcap gave {what}: {_last(errors)}; check that java runs here")
