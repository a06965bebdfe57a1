"""The `qemu` driver: virtual machines, reached over QMP and by injection.  QEMU itself runs unmodified."""
