"""The one migration history, for SQLite and PostgreSQL."""
