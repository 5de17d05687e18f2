"""What the command line can do; one command, or one part of it, a file."""
