"""What the algorithms of the literature are combined of: directions, variance reductions, and loops."""
