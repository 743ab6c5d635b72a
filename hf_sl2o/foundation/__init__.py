"""What everything stands on: files that are whole or not there, checks of what is read, the Hub, processes.

- `files`, `partials`, `locks`: safetensors and JSON, written atomically, with a checksum; what a kill left; one writer
- `pieces`: safetensors files that are read in pieces, or are views of the file
- `checked`: numbers, flags and tensors from a file or a user, refused in words
- `hub`: `save_pretrained`, `from_pretrained`, `push_to_hub` of rules and bases;  `remote`: files of a Hub repository,
  and commits to one;  `cards`: model cards
- `native`: C++ loops, compiled at their first use
- `ranks`: whether all processes of a run were started alike;  `watch`: which one is missing, after a failed collective

It may import nothing of hf_sl2o.
"""
