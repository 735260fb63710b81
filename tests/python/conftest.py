"""What every Python test shares. Markers, strictness and the time limit of a test are in pyproject.toml."""
