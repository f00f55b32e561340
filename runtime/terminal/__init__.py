"""Text, tables, colours and progress for people at a terminal."""
