"""draftsmith: trains, proves and measures drafters that make a language model answer faster without changing its answers."""

__version__ = "0.1.0"
