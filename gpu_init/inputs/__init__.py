"""Interactions and features: from files to arrays, checked at the door."""
