"""What to train on: token scores, the samples that are worth their time, and token weights."""
