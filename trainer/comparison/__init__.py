"""Comparing runs: costs, results and their summary."""
