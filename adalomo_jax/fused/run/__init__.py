"""Runs a step: the forward pass, and the backward pass, which updates the weights."""
