"""What a person runs: recipes, the runner, the planner, chat and serve."""
