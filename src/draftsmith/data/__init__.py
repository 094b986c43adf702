"""Conversations and prompts: read, checked, made on the spot, tokenised; benchmarks; the stores of what a target computed."""
