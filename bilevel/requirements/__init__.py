"""What inner problems offer and estimators require: declared as data, compared in one place."""
