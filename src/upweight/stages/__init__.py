"""The verbs of the recipe, one a file, in the order of the report. No stage imports another."""
