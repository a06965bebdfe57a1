"""``migrated demo`` and the guests that it runs.  No daemon needs this package."""
