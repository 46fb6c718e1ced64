"""Configuration: the typed schema, the YAML files that ship, and how they are loaded."""
