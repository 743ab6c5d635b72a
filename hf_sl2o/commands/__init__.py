"""What stands behind `hf-sl2o COMMAND`, a module each: `add_arguments(parser)`, and `run(arguments)`.

`run` returns what `--json` prints, as JSON values, and the text for a person. What is wrong with the input it raises
as `ValueError`. It may print what it is doing: that goes to stderr. The module's docstring is its help.

- `plan`: what a training step will cost;  `extract`: a basis from a recorded run
- `meta_train`, `compare`: on the tasks that come with the package;  `settings`: of these, from options and a file
- `inspect`: what is in a file or folder;  `contents`: what is said of each kind
- `push`, `pull`: to the Hub and back;  `kinds`: rules, bases and fine-tunes, loaded with all checks
- `report`: a page to look at
- `folders`: written whole or not at all;  `words`: sizes, times, tables

It may import all of hf_sl2o but `run` and `cli`.
"""
