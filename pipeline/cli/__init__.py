"""Shared by all commands: running them, parsing flags, filtering log output."""
