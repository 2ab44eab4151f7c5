"""Predicting runs: a scheduler that decides step by step as vLLM does, a step-time model, and virtual time."""
