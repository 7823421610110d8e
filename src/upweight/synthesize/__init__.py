"""What a model should imitate or try: problems, refined solutions, reconstructed chains, pairs."""
