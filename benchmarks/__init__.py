"""What is measured; `results/` has the numbers, with device, versions and raw repeats."""
