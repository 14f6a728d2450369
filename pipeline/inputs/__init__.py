"""What a store is made from: data sets and teachers."""
