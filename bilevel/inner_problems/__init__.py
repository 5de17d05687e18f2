"""What y*(x) is: the kinds of inner problem, one a file."""
