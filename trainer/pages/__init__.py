"""Charts and reports of comparisons."""
