"""The parts that both agents share: the table of migrations, a migration and its record."""
