"""The `qemu` driver: virtual machines, over QMP and by injection."""
