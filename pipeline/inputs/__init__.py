"""Inputs of a store: data sets and teachers."""
