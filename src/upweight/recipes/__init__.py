"""Recipes: values only, one function returns one run. Nothing imports them."""
