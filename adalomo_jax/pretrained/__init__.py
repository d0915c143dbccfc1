"""Weights and tokenizers that others trained."""
