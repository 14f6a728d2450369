"""What a run is asked: recipes, lengths, choices, and the files that record them."""
