"""One equation a file."""
