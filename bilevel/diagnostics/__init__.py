"""Is a problem well posed, and which estimator is right on it."""
