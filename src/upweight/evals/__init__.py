"""Measuring: estimators and one file a benchmark family."""
