"""The parts of `python -m benchmarks.same_numbers`: cases, the child that trains them, material, and the comparison."""
