"""Values that travel: pickled, as plain data, and in files."""
