"""The agent seen from outside: the control API on its Unix socket, and the read-only status site."""
