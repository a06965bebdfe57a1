"""Guest memory: how the agents find, reserve and track it, and how the C core moves it.

No module here depends on a kind of guest.
"""
