"""recipes.common"""
