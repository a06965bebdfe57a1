"""The `process` driver: guests are programs that co-operate with the agent."""
