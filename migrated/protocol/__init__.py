"""The control protocol, without I/O and without a clock: messages, framing, and the two session state machines."""
