"""E2E, CIFAR and image folders: read with checks, or generated where there is no download."""
