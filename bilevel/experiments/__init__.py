"""What `bilevel run NAME` runs: a method with its data, settings and pictures."""
