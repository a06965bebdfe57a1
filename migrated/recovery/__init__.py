"""What outlives an agent: the journal, and descriptors in somebody else's keeping."""
