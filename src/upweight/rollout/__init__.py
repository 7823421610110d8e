"""Sampling, and running what was sampled."""
