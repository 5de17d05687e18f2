"""Where tasks come from: sinusoids, linear regressions, images by class, and your own."""
