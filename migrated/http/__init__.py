"""The agent's HTTP interfaces: the control API on its Unix socket, and the read-only status site.

docs/http.md describes both.
"""
