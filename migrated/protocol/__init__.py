"""The control protocol: messages, framing, and the two session state machines.  No I/O and no clock here."""
