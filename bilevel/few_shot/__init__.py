"""Few-shot learning: training a learner over tasks, and evaluating it."""
