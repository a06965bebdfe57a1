"""Guest drivers: the code through which an agent talks to each kind of guest.

driver.py defines their contract, and registry.py holds the guests that a configuration names.
"""
