"""What tests with real guests stand on: hosts with agents, a guest that moves between them, page pools, namespaces."""
