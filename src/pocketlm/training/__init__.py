"""Training: the state, the step, the loop, and what a person sees of them."""
