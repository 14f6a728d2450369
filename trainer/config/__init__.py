"""Configuration of a run: recipes, lengths, values of flags, and the files that record them."""
