"""The control connection between two agents."""
