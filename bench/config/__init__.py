"""Experiments: typed YAML, validated with line numbers, expanded to cells."""
