"""Arguments: what their annotations and declared ranges say, and the refusal of what is neither."""
