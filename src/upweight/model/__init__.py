"""The Llama family, its cache, its log-probabilities and its weights."""
