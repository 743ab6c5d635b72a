"""What stays on disk between two starts: files with a checksum, keys, stages, and runs of a Trainer."""
