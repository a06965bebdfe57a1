"""State that outlives an agent: the journal, and descriptors kept by another process."""
