"""Access to other processes: pidfds, and system calls made in them."""
