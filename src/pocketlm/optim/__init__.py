"""How gradients become updates: parameter groups, AdamW, Muon, and the learning rate as a function of the step."""
