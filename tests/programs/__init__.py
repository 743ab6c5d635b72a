"""Scripts as users write them, which know nothing of hf_sl2o, and what they compute written as plain torch loops.

- `run_clm`, `run_image_classification`, `run_seq2seq`, `run_sft`, `run_search`: the scripts
- `by_hand`: models, data and loops that the tests hold them against
"""
