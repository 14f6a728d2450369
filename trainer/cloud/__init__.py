"""Launching runs on TPU VMs."""
