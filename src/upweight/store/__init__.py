"""Artifacts and token shards on disk."""
