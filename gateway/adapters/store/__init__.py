"""Where the store keeps its entries: memory, SQLite, Redis; and the guard around those that may be out of reach."""
