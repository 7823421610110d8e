"""Judging completions: every reward is a Verifier."""
