"""The `process` driver: programs that co-operate."""
