"""Conversations and prompts: read, checked, made on the spot, tokenised; benchmarks; stores of what targets compute."""
