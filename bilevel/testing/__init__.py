"""Property tests for your own estimators and problems."""
