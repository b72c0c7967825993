"""Recipes: one `get_config()` a file."""
