"""What happens in a step: the forward pass, and the backward pass in which weights are updated."""
