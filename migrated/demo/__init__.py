"""``migrated demo``, and the guests it runs; no daemon needs any of it."""
