"""Training runs on TPU VMs."""
