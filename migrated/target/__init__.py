"""The target side: one migration, the agent."""
