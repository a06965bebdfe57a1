"""Access to other processes: pidfds, and system calls that are run in them.

The drivers of all kinds of guest share these modules.
"""
