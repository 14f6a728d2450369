"""Replicas, workers and TPUs."""
