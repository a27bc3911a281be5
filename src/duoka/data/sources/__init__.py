"""Sources of local batches, one kind of user loader a file."""
