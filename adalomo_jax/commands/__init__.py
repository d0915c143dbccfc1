"""The commands: for each its options, and what runs it."""
