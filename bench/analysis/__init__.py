"""Pure functions from records to Estimates."""
