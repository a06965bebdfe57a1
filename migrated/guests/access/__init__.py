"""Access to other processes: pidfds, and system calls that are run in them."""
