"""One training step: distiller, loss, optimizer, schedule."""
