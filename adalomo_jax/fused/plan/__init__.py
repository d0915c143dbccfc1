"""What will be updated where: a value, made of the traced loss before anything runs."""
