"""A training run: the program that it compiles, its loop, and what it writes."""
