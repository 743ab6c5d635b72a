"""Small problems that rules are meta-trained and judged on: `problems`, `networks`, and tasks by name (`named`)."""
