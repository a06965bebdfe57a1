"""Fixtures for tests with real guests: hosts with agents, a guest that migrates between them, page pools, namespaces."""
