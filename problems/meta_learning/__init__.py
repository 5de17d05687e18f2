"""Methods over tasks: a problem with the estimator and the adaptation that it is published with, as a `Learner`."""
