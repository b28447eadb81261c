"""Networks as people write them: weights that no `nn.Linear` holds, and modules of torch in their usual uses."""
