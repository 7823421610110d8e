"""Text to tokens: the tokenizer and the chat template with its loss mask."""
