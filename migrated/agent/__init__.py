"""What both agents are made of: the table of migrations, a migration and its record."""
