"""Evaluation of models on sets of problems: estimators, their errors, the files and figures of the results."""
