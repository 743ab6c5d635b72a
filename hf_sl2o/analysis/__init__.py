"""What learned rules do, and how else it can be said.

- `paths`: gradients and coefficients of a run step by step, and samples of what a rule saw and did
- `symbolic`: expressions that stand for a rule, found by genetic programming;  `scores`: how near they come

It may import `meta`, `optim`, `rules`, `subspace` and `foundation`, numpy and torch; no plots and no data sets.
"""
