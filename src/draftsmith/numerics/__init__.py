"""Pure functions of logits and distributions: what scores, losses and verification are made of."""
