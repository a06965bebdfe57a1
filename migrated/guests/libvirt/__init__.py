"""The `libvirt` driver: virtual machines that libvirt manages, on both sides and all the time."""
