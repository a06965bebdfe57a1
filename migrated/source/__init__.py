"""The source side: options, the convergence policy, one migration, the agent."""
