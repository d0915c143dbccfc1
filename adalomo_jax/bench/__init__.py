"""What a training step costs: each optimizer in a process of its own, all taking steps in turn."""
