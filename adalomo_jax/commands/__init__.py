"""The commands: the options of each, and the code that runs it."""
