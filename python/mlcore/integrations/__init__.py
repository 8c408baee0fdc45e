"""Adapters that put mlcore's layers under other libraries. Each is imported by name and needs that library only."""
