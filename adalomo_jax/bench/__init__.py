"""Measures what a training step costs. Each optimizer has a process of its own, and all take steps in turn."""
