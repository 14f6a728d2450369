"""Comparison of finished runs: costs, results and their summary."""
