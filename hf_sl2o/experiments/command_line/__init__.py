"""What a script is told: `flags`, command lines of a `recipe` and a `study`; how it begins and ends: `script`."""
