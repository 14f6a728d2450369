"""What every command shares: running it, parsing flags, filtering logs."""
