"""``migrated demo`` and the guests that it runs; no daemon needs this package."""
