"""Command line, data, models and demos: what connects the engine to other libraries."""
