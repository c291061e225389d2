"""What writes the weights. Each engine is a module with the same call and the same output."""
