"""The DuckDB database of models, profiles, plans and runs."""
