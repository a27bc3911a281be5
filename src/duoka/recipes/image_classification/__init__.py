"""recipes.image_classification"""
