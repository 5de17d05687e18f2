"""Files from outside, whose contents nobody vouches for: images, archives and arrays, read within limits."""
