"""Drivers: how an agent talks to each kind of guest.  driver.py is their contract, registry.py the guests of a configuration."""
