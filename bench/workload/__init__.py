"""What is asked of an engine: prompts and lengths, synthetic, from traces or from data sets."""
