"""A package of its own: tracing puts the folder of a model file in front of the import path."""
