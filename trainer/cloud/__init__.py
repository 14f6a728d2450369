"""A training job on a TPU VM, by the gcloud command and a script on its host."""
