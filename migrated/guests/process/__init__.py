"""The `process` driver: guests are programs that co-operate with the agent.

They use the Python client in client.py, or the C client in native/include/migrated_guest.h.
"""
