"""In front of Inductor: `torch.compile(model, backend="burnish")`, and what makes graphs for training faster there."""
