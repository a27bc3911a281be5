"""Code that all recipes share."""
